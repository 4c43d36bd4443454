//! How far a long piece of work is: a bar on a terminal, a line in the log every few seconds elsewhere.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Often enough to see that it moves, seldom enough to keep a night's log readable.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// A terminal has one screen, so its bars are one value of the process.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Runs `write` with the bars taken off the screen, so that what it prints does not run into them.
pub(super) fn beside_bars<T>(write: impl FnOnce() -> T) -> T {
    match LazyLock::get(&BARS) {
        Some(bars) => bars.suspend(write),
        None => write(),
    }
}

/// Progress of one piece of work, in bytes. Cheap to clone; clones move the same bar.
#[derive(Debug, Clone)]
pub struct Progress(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    what: String,
    started: Instant,
    done: AtomicU64,
    /// 0 while it is not known.
    total: AtomicU64,
    display: Display,
}

#[derive(Debug)]
enum Display {
    Bar(ProgressBar),
    Lines {
        phase: Mutex<String>,
        /// Milliseconds since the start at which the next line is due.
        next_line: AtomicU64,
    },
    Nothing,
}

impl Progress {
    /// Shows a bar when standard error is a terminal, else writes lines to the log. `what` names the work
    /// in every line, for example `backup 20260102T030405Z`.
    pub fn start(what: impl Into<String>) -> Self {
        if io::stderr().is_terminal() { Self::bar(what) } else { Self::lines(what) }
    }

    /// Writes lines to the log, whatever standard error is: what the agent uses.
    pub fn lines(what: impl Into<String>) -> Self {
        let next_line = AtomicU64::new(milliseconds(LINE_INTERVAL));
        Self::new(what, Display::Lines { phase: Mutex::default(), next_line })
    }

    /// Counts and shows nothing.
    pub fn hidden() -> Self {
        Self::new("", Display::Nothing)
    }

    fn bar(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = BARS.add(ProgressBar::no_length().with_prefix(what.clone()));
        bar.set_style(without_total());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self::new(what, Display::Bar(bar))
    }

    fn new(what: impl Into<String>, display: Display) -> Self {
        Self(Arc::new(Inner {
            what: what.into(),
            started: Instant::now(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            display,
        }))
    }

    /// Says what is going on now, such as `waiting for checkpoint`.
    pub fn phase(&self, phase: &str) {
        match &self.0.display {
            Display::Bar(bar) => bar.set_message(phase.to_owned()),
            Display::Lines { phase: current, .. } => {
                phase.clone_into(&mut current.lock().unwrap_or_else(PoisonError::into_inner));
                tracing::info!(work = self.0.what, phase, "progress");
            }
            Display::Nothing => {}
        }
    }

    /// Bytes expected in all; may be corrected on the way.
    pub fn set_total(&self, bytes: u64) {
        self.0.total.store(bytes, Ordering::Relaxed);
        if let Display::Bar(bar) = &self.0.display {
            bar.set_length(bytes);
            bar.set_style(with_total());
        }
    }

    /// Counts `bytes` more as done.
    pub fn add(&self, bytes: u64) {
        let done = self.0.done.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        match &self.0.display {
            Display::Bar(bar) => bar.set_position(done),
            Display::Lines { phase, next_line } => self.maybe_line(done, phase, next_line),
            Display::Nothing => {}
        }
    }

    /// Bytes expected in all, once that is known.
    pub fn total(&self) -> Option<u64> {
        Some(self.0.total.load(Ordering::Relaxed)).filter(|total| *total > 0)
    }

    pub fn done(&self) -> u64 {
        self.0.done.load(Ordering::Relaxed)
    }

    /// Takes the bar away; the caller prints or logs the result.
    pub fn finish(&self) {
        if let Display::Bar(bar) = &self.0.display {
            bar.finish_and_clear();
            BARS.remove(bar);
        }
    }

    fn maybe_line(&self, done: u64, phase: &Mutex<String>, next_line: &AtomicU64) {
        let elapsed = self.0.started.elapsed();
        let now = milliseconds(elapsed);
        let due = next_line.load(Ordering::Relaxed);
        let next = now.saturating_add(milliseconds(LINE_INTERVAL));
        // Several threads add at once; the one that moves the mark writes the line.
        if now < due || next_line.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return;
        }
        let total = self.total();
        let phase = phase.lock().unwrap_or_else(PoisonError::into_inner).clone();
        tracing::info!(work = self.0.what, phase, "{}", line(done, total, elapsed));
    }
}

fn with_total() -> ProgressStyle {
    style("{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}")
}

fn without_total() -> ProgressStyle {
    style("{prefix} {spinner} {bytes} {bytes_per_sec} {elapsed} {msg}")
}

fn style(template: &str) -> ProgressStyle {
    // The templates are the two above; a bar is better plain than not there.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// `1.0 GiB of 4.0 GiB, 25 %, 64.0 MiB/s, 48s left`.
fn line(done: u64, total: Option<u64>, elapsed: Duration) -> String {
    let rate = rate(done, elapsed);
    let share = total.map(|total| {
        // The total is PostgreSQL's estimate and the data may outgrow it.
        let percent = (u128::from(done) * 100 / u128::from(total.max(1))).min(100);
        format!(" of {}, {percent} %", ByteSize(total))
    });
    let left = total.and_then(|total| total.saturating_sub(done).checked_div(rate));
    let left = left.map(|seconds| format!(", {} left", short_time(seconds)));
    let (share, left) = (share.unwrap_or_default(), left.unwrap_or_default());
    format!("{}{share}, {}/s{left}", ByteSize(done), ByteSize(rate))
}

/// Bytes a second on average.
fn rate(done: u64, elapsed: Duration) -> u64 {
    let rate = u128::from(done) * 1000 / elapsed.as_millis().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// `48s`, `3m 05s`, `2h 00m`.
fn short_time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_line_tells_amount_share_rate_and_time_left() {
        assert_eq!(
            line(GIB, Some(4 * GIB), Duration::from_secs(16)),
            "1.0 GiB of 4.0 GiB, 25 %, 64.0 MiB/s, 48s left"
        );
    }

    #[test]
    fn a_line_without_total_guesses_nothing() {
        assert_eq!(line(GIB, None, Duration::from_secs(1)), "1.0 GiB, 1.0 GiB/s");
    }

    #[test]
    fn no_figure_is_absurd_at_the_edges() {
        assert_eq!(line(0, Some(0), Duration::ZERO), "0 B of 0 B, 0 %, 0 B/s");
        assert_eq!(line(0, Some(GIB), Duration::ZERO), "0 B of 1.0 GiB, 0 %, 0 B/s");
        // more than was announced
        assert!(line(3 * GIB, Some(GIB), Duration::from_secs(1)).contains("100 %"));
        assert!(line(u64::MAX, Some(u64::MAX), Duration::ZERO).ends_with("0s left"));
    }

    #[test]
    fn times_left_are_short() {
        assert_eq!(short_time(59), "59s");
        assert_eq!(short_time(185), "3m 05s");
        assert_eq!(short_time(7230), "2h 00m");
    }

    #[test]
    fn clones_count_together() {
        let progress = Progress::hidden();
        progress.clone().add(5);
        progress.add(7);
        assert_eq!(progress.done(), 12);
    }
}
