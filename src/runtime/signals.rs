//! What the operating system tells us: stop, or read the configuration again.

use std::io;

use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

/// A request from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM: finish what is in flight and go.
    Terminate,
    /// SIGINT, a person at a terminal: the same.
    Interrupt,
    /// SIGHUP: read the configuration again.
    Reload,
}

/// Listens for signals; from its creation on, they no longer end the process by themselves.
#[derive(Debug)]
pub struct Signals {
    terminate: Stream,
    interrupt: Stream,
    reload: Stream,
}

impl Signals {
    /// # Errors
    /// When the operating system does not let us listen.
    pub fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            reload: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) -> Signal {
        tokio::select! { biased;
            _ = self.terminate.recv() => Signal::Terminate,
            _ = self.interrupt.recv() => Signal::Interrupt,
            _ = self.reload.recv() => Signal::Reload,
        }
    }
}

/// Waits until the program is asked to stop, for commands that have nothing to reload.
///
/// SIGHUP is not listened for here: it ends such a command when its terminal goes, as usual.
///
/// # Errors
/// When the operating system does not let us listen.
pub async fn shutdown_signal() -> io::Result<Signal> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::select! { biased;
        _ = terminate.recv() => Signal::Terminate,
        _ = interrupt.recv() => Signal::Interrupt,
    })
}
