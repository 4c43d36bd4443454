//! Keeps the allocator from hoarding memory.
//!
//! glibc raises the size from which it gives memory back at once to that of the largest buffer freed so
//! far, and then keeps such buffers, for each thread its own: a catch-up was seen to need 108 MiB instead of
//! 60. Both can be set from outside only, and are read once, so the program starts itself over with them.
//! (A different allocator was worse: mimalloc needed 187 MiB.)

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::runtime::variable;

/// `mallopt(3)`: from this size on memory goes back as soon as it is freed, and that size stays. Frames and
/// pages are below it: mapping each anew cost a base backup a fifth of its speed.
const MMAP_THRESHOLD: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "2097152");
/// `mallopt(3)`: all threads share one arena, so that what one frees another can use.
const ARENAS: (&str, &str) = ("MALLOC_ARENA_MAX", "1");
/// `mallopt(3)`: what is free at the end of the arena goes back from this size on, not at every turn.
const TRIM_THRESHOLD: (&str, &str) = ("MALLOC_TRIM_THRESHOLD_", "2097152");

/// Starts this program over, as the same process, unless the allocator is set already. Where that does not
/// work it goes on without, which costs memory and nothing else.
pub fn settle() {
    if !cfg!(target_env = "gnu") || variable(MMAP_THRESHOLD.0).is_some() {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut arguments = std::env::args_os();
    let called = arguments.next().unwrap_or_default();
    let mut command = Command::new(program);
    command.arg0(called).args(arguments);
    for (name, value) in [MMAP_THRESHOLD, ARENAS, TRIM_THRESHOLD] {
        if variable(name).is_none() {
            command.env(name, value);
        }
    }
    let error = command.exec();
    tracing::debug!(%error, "cannot set the allocator");
}
