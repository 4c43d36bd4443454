//! Telling the service manager how we are: systemd's `sd_notify`, when `NOTIFY_SOCKET` is set.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use super::environment::variable;

/// What the service manager is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceState {
    /// Started, or done with reading the configuration again.
    Ready,
    Reloading,
    Stopping,
}

/// Tells the service manager, if there is one. One that does not listen is none.
pub fn notify_service(state: ServiceState) {
    let Some(place) = variable("NOTIFY_SOCKET") else { return };
    let message = match state {
        ServiceState::Ready => "READY=1\n".to_owned(),
        ServiceState::Stopping => "STOPPING=1\n".to_owned(),
        ServiceState::Reloading => {
            // `Type=notify-reload` compares it with the time of its own signal.
            let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            format!("RELOADING=1\nMONOTONIC_USEC={}\n", now.tv_sec * 1_000_000 + now.tv_nsec / 1000)
        }
    };
    if let Err(error) = send(&place, message.as_bytes()) {
        tracing::debug!(%error, ?state, "the service manager cannot be told");
    }
}

fn send(place: &str, message: &[u8]) -> std::io::Result<()> {
    let address = match place.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(place)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(message, &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_a_path_or_an_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let abstract_name = format!("pgkeep-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        for (place, listener) in [
            (path.to_str().unwrap().to_owned(), UnixDatagram::bind(&path).unwrap()),
            (format!("@{abstract_name}"), UnixDatagram::bind_addr(&address).unwrap()),
        ] {
            send(&place, b"READY=1\n").unwrap();
            let mut message = [0; 64];
            let length = listener.recv(&mut message).unwrap();
            assert_eq!(&message[..length], b"READY=1\n");
        }
    }
}
