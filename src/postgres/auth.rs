//! Proving to the server who we are.
//!
//! Pure: a state machine that is given the server's `R` messages and says what to answer. Cleartext, MD5
//! and SCRAM-SHA-256, the last with channel binding (`-PLUS`) when the session is encrypted. A server
//! cannot talk us down: with channel binding required nothing else is answered, and after SCRAM has
//! begun the server must prove that it knows the password too.

use bytes::BytesMut;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};

use super::conninfo::ChannelBindingPolicy;
use super::wire::{Authentication, frontend};
use crate::secret::Secret;

const SCRAM: &str = "SCRAM-SHA-256";
const SCRAM_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// Why no agreement with the server was reached. Nothing here becomes better by trying again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    #[error("server asks for a password and none is configured")]
    NoPassword,
    #[error(
        "server asks for authentication method {0}, which pgkeep does not know (Kerberos, GSSAPI and SSPI are not supported)"
    )]
    Method(String),
    #[error("`channel_binding=require` is set, but the server or the connection cannot do it")]
    NoChannelBinding,
    #[error("server sent an authentication message out of turn")]
    Sequence,
    #[error("server could not prove that it knows the password: {0}")]
    Server(String),
}

/// The client's half of one authentication.
pub struct Authenticator {
    user: String,
    password: Option<Secret>,
    binding: ChannelBindingPolicy,
    /// The digest of the server's certificate; `None` when the session is not encrypted.
    end_point: Option<Vec<u8>>,
    encrypted: bool,
    state: State,
}

enum State {
    Start,
    /// An answer was sent that the server accepts or refuses.
    Answered,
    ScramFirst {
        scram: Box<ScramSha256>,
        bound: bool,
    },
    ScramLast {
        scram: Box<ScramSha256>,
        bound: bool,
    },
    ScramProven {
        bound: bool,
    },
}

/// What to do after one of the server's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send what was written, if anything, and wait for the next message.
    Continue,
    /// The server has let us in.
    Accepted,
}

impl Authenticator {
    /// `end_point` is the `tls-server-end-point` digest where the server's certificate allows one.
    pub fn new(
        user: &str,
        password: Option<Secret>,
        binding: ChannelBindingPolicy,
        encrypted: bool,
        end_point: Option<Vec<u8>>,
    ) -> Self {
        Self { user: user.to_owned(), password, binding, end_point, encrypted, state: State::Start }
    }

    /// Takes one message of the server and writes the answer to `out`.
    pub fn step(&mut self, message: Authentication, out: &mut BytesMut) -> Result<Verdict, AuthError> {
        let must_bind = self.binding == ChannelBindingPolicy::Require;
        match (std::mem::replace(&mut self.state, State::Answered), message) {
            // Let in, or asked for a password, without a proof that is bound to this TLS session.
            (
                State::Start | State::Answered | State::ScramProven { bound: false },
                Authentication::Ok | Authentication::CleartextPassword | Authentication::Md5Password { .. },
            ) if must_bind => Err(AuthError::NoChannelBinding),
            (State::Start | State::Answered | State::ScramProven { .. }, Authentication::Ok) => {
                Ok(Verdict::Accepted)
            }
            (State::Start, Authentication::CleartextPassword) => {
                frontend::password(out, self.password()?.as_bytes());
                Ok(Verdict::Continue)
            }
            (State::Start, Authentication::Md5Password { salt }) => {
                let hash = md5_hash(self.user.as_bytes(), self.password()?.as_bytes(), salt);
                frontend::password(out, hash.as_bytes());
                Ok(Verdict::Continue)
            }
            (State::Start, Authentication::Sasl { mechanisms }) => self.begin_scram(&mechanisms, out),
            (State::ScramFirst { mut scram, bound }, Authentication::SaslContinue(data)) => {
                scram.update(&data).map_err(|error| AuthError::Server(error.to_string()))?;
                frontend::sasl_response(out, scram.message());
                self.state = State::ScramLast { scram, bound };
                Ok(Verdict::Continue)
            }
            (State::ScramLast { mut scram, bound }, Authentication::SaslFinal(data)) => {
                scram.finish(&data).map_err(|error| AuthError::Server(error.to_string()))?;
                self.state = State::ScramProven { bound };
                Ok(Verdict::Continue)
            }
            (_, Authentication::Unsupported(number)) => Err(AuthError::Method(number.to_string())),
            _ => Err(AuthError::Sequence),
        }
    }

    fn begin_scram(&mut self, mechanisms: &[String], out: &mut BytesMut) -> Result<Verdict, AuthError> {
        let offers = |name: &str| mechanisms.iter().any(|mechanism| mechanism == name);
        let end_point = self.end_point.take().filter(|_| self.binding != ChannelBindingPolicy::Disable);
        let (mechanism, binding, bound) = match end_point {
            Some(digest) if offers(SCRAM_PLUS) => {
                (SCRAM_PLUS, ChannelBinding::tls_server_end_point(digest), true)
            }
            _ if self.binding == ChannelBindingPolicy::Require => return Err(AuthError::NoChannelBinding),
            _ if !offers(SCRAM) => return Err(AuthError::Method(mechanisms.join(", "))),
            // "We could have bound": a server that does offer -PLUS then knows that its offer was removed
            // on the way.
            Some(_) if self.encrypted => (SCRAM, ChannelBinding::unrequested(), false),
            _ => (SCRAM, ChannelBinding::unsupported(), false),
        };
        let scram = Box::new(ScramSha256::new(self.password()?.as_bytes(), binding));
        frontend::sasl_initial_response(out, mechanism, scram.message());
        self.state = State::ScramFirst { scram, bound };
        Ok(Verdict::Continue)
    }

    fn password(&self) -> Result<&str, AuthError> {
        self.password.as_ref().map(|password| password.reveal().as_str()).ok_or(AuthError::NoPassword)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn authenticator(password: Option<&str>, binding: ChannelBindingPolicy, tls: bool) -> Authenticator {
        let password = password.map(|password| Secret::new(password.to_owned()));
        Authenticator::new("backup", password, binding, tls, tls.then(|| vec![1; 32]))
    }

    fn sasl(mechanisms: &[&str]) -> Authentication {
        Authentication::Sasl { mechanisms: mechanisms.iter().map(|&name| name.to_owned()).collect() }
    }

    #[test]
    fn md5_is_what_the_server_computes() {
        let mut out = BytesMut::new();
        let mut auth = authenticator(Some("secret"), ChannelBindingPolicy::Prefer, false);
        auth.step(Authentication::Md5Password { salt: [1, 2, 3, 4] }, &mut out).unwrap();
        assert_eq!(&out[..5], b"p\0\0\0\x28");
        assert!(out[5..].starts_with(b"md5"));
        assert_eq!(auth.step(Authentication::Ok, &mut out), Ok(Verdict::Accepted));
    }

    #[test]
    fn binding_is_used_where_both_sides_can() {
        for (tls, binding, offered, gs2) in [
            (true, ChannelBindingPolicy::Prefer, vec![SCRAM_PLUS, SCRAM], "p=tls-server-end-point,,"),
            (true, ChannelBindingPolicy::Prefer, vec![SCRAM], "y,,"),
            (true, ChannelBindingPolicy::Disable, vec![SCRAM_PLUS, SCRAM], "n,,"),
            (false, ChannelBindingPolicy::Prefer, vec![SCRAM], "n,,"),
        ] {
            let mut out = BytesMut::new();
            authenticator(Some("x"), binding, tls).step(sasl(&offered), &mut out).unwrap();
            let text = String::from_utf8_lossy(&out).into_owned();
            assert!(text.contains(&format!("{gs2}n=,r=")), "{text}");
        }
    }

    #[test]
    fn required_binding_answers_nothing_weaker() {
        for message in [
            Authentication::Ok,
            Authentication::CleartextPassword,
            Authentication::Md5Password { salt: [0; 4] },
            sasl(&[SCRAM]),
        ] {
            let mut out = BytesMut::new();
            let mut auth = authenticator(Some("x"), ChannelBindingPolicy::Require, true);
            assert_eq!(auth.step(message, &mut out), Err(AuthError::NoChannelBinding));
            assert!(out.is_empty());
        }
    }

    #[test]
    fn a_server_that_skips_its_proof_is_not_believed() {
        let mut out = BytesMut::new();
        let mut auth = authenticator(Some("x"), ChannelBindingPolicy::Prefer, false);
        auth.step(sasl(&[SCRAM]), &mut out).unwrap();
        assert_eq!(auth.step(Authentication::Ok, &mut out), Err(AuthError::Sequence));
    }

    #[test]
    fn a_server_that_answers_nonsense_is_not_believed() {
        let mut out = BytesMut::new();
        let mut auth = authenticator(Some("x"), ChannelBindingPolicy::Prefer, false);
        auth.step(sasl(&[SCRAM]), &mut out).unwrap();
        let nonsense = Authentication::SaslContinue(Bytes::from_static(b"r=other,s=AAAA,i=4096"));
        assert!(matches!(auth.step(nonsense, &mut out), Err(AuthError::Server(_))));
    }

    #[test]
    fn a_missing_password_is_said_and_not_sent_as_empty() {
        let mut out = BytesMut::new();
        let mut auth = authenticator(None, ChannelBindingPolicy::Prefer, false);
        assert_eq!(auth.step(Authentication::CleartextPassword, &mut out), Err(AuthError::NoPassword));
        assert!(out.is_empty());
    }
}
