//! Messages of PostgreSQL's wire protocol 3.0, in and out of a buffer.
//!
//! Pure. [`Message::take`] cuts one whole message off the front of a buffer and leaves the buffer alone
//! while the message is not complete, so that it does not matter how the network split the stream.
//! Payloads are slices of the buffer, not copies. Replication adds two tags that ordinary clients never
//! meet: `W` (copy in both directions) and everything inside its `d` messages, see
//! [`replication`](super::replication).
//!
//! Source: the chapter "Frontend/Backend Protocol" of PostgreSQL's manual.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Longest message accepted before the server has let us in. Keeps a peer that is not PostgreSQL (its
/// first bytes then read as a length) from making us wait for, and hold, gigabytes.
pub const MAX_GREETING: usize = 64 << 10;

/// Longest message accepted afterwards. Copy data comes in at most 160 KiB or so, and the largest row
/// we ask for is a timeline history file.
pub const MAX_MESSAGE: usize = 16 << 20;

/// One message from the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// `R`: a step of the authentication.
    Authentication(Authentication),
    /// `K`: how to cancel queries; pgkeep never does.
    BackendKeyData,
    /// `S`: may come in the midst of anything.
    ParameterStatus { name: String, value: String },
    /// `v`: the server speaks an older minor protocol, or does not know a protocol option.
    NegotiateProtocolVersion,
    /// `E`
    Error(ServerError),
    /// `N`: may come in the midst of anything.
    Notice(ServerError),
    /// `A`: may come in the midst of anything.
    Notification,
    /// `T`: the names of the columns that follow.
    RowDescription(Vec<String>),
    /// `D`
    DataRow(Row),
    /// `C`
    CommandComplete(String),
    /// `I`
    EmptyQuery,
    /// `Z`: the server waits for the next command.
    Ready,
    /// `G`
    CopyIn,
    /// `H`
    CopyOut,
    /// `W`
    CopyBoth,
    /// `d`
    CopyData(Bytes),
    /// `c`
    CopyDone,
}

/// What the server asks for, or says, while it finds out who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authentication {
    Ok,
    CleartextPassword,
    Md5Password {
        salt: [u8; 4],
    },
    Sasl {
        mechanisms: Vec<String>,
    },
    SaslContinue(Bytes),
    SaslFinal(Bytes),
    /// Kerberos, GSSAPI, SSPI and whatever comes next: the protocol's number of it.
    Unsupported(i32),
}

/// The values of one row, as text; `None` is NULL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row(Vec<Option<Bytes>>);

impl Row {
    pub fn new(values: Vec<Option<Bytes>>) -> Self {
        Self(values)
    }

    /// The bytes of one column; `None` when it is NULL or does not exist.
    pub fn get(&self, column: usize) -> Option<&Bytes> {
        self.0.get(column)?.as_ref()
    }

    /// The text of one column; `None` when it is NULL, does not exist or is not UTF-8.
    pub fn text(&self, column: usize) -> Option<&str> {
        std::str::from_utf8(self.get(column)?).ok()
    }
}

/// What the server says in an `E` or `N` message.
///
/// `code` is the SQLSTATE and the only part that is safe to decide by: the texts are translated into the
/// server's language.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    /// `ERROR`, `FATAL`, `PANIC`, `WARNING`, … never translated.
    pub severity: String,
    pub code: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    /// The function in the server's source that raised it.
    pub routine: Option<String>,
}

impl ServerError {
    /// Whether the server closes the session after this.
    pub fn ends_session(&self) -> bool {
        matches!(self.severity.as_str(), "FATAL" | "PANIC")
    }

    /// Whether this function of the server raised it, which says what happened in any language.
    pub fn is_from(&self, routine: &str) -> bool {
        self.routine.as_deref() == Some(routine)
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.severity, self.code, self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        Ok(())
    }
}

impl std::error::Error for ServerError {}

/// Bytes that are not the PostgreSQL protocol. The connection cannot be used any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("message `{tag}` claims {length} bytes, more than the {limit} expected at this point")]
    TooLong { tag: char, length: u32, limit: usize },
    #[error("message `{0}` has a length below four")]
    TooShort(char),
    #[error("message `{0}` is not known")]
    UnknownTag(char),
    #[error("message `{0}` is malformed")]
    Malformed(char),
}

/// Tag and length.
const HEADER: usize = 5;

impl Message {
    /// Cuts the first message off `inbox`, or says how much is missing.
    ///
    /// `limit` is the longest body to accept, in bytes.
    pub fn take(inbox: &mut BytesMut, limit: usize) -> Result<Step, WireError> {
        if inbox.len() < HEADER {
            return Ok(Step::Needs(HEADER - inbox.len()));
        }
        let tag = inbox[0];
        let name = char::from(tag);
        let length = u32::from_be_bytes([inbox[1], inbox[2], inbox[3], inbox[4]]);
        let Some(body_length) = length.checked_sub(4) else { return Err(WireError::TooShort(name)) };
        let body_length = usize::try_from(body_length)
            .ok()
            .filter(|&body| body <= limit)
            .ok_or(WireError::TooLong { tag: name, length, limit })?;
        // An unknown tag is refused before its body is waited for.
        if !is_known(tag) {
            return Err(WireError::UnknownTag(name));
        }
        let whole = HEADER + body_length;
        if inbox.len() < whole {
            return Ok(Step::Needs(whole - inbox.len()));
        }
        let mut body = inbox.split_to(whole).freeze();
        body.advance(HEADER);
        parse(tag, body).map(Step::Message).ok_or(WireError::Malformed(name))
    }
}

impl Message {
    /// The manual's name of the message, for errors.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Authentication(_) => "Authentication",
            Self::BackendKeyData => "BackendKeyData",
            Self::ParameterStatus { .. } => "ParameterStatus",
            Self::NegotiateProtocolVersion => "NegotiateProtocolVersion",
            Self::Error(_) => "ErrorResponse",
            Self::Notice(_) => "NoticeResponse",
            Self::Notification => "NotificationResponse",
            Self::RowDescription(_) => "RowDescription",
            Self::DataRow(_) => "DataRow",
            Self::CommandComplete(_) => "CommandComplete",
            Self::EmptyQuery => "EmptyQueryResponse",
            Self::Ready => "ReadyForQuery",
            Self::CopyIn => "CopyInResponse",
            Self::CopyOut => "CopyOutResponse",
            Self::CopyBoth => "CopyBothResponse",
            Self::CopyData(_) => "CopyData",
            Self::CopyDone => "CopyDone",
        }
    }
}

/// Outcome of [`Message::take`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Message(Message),
    /// At least so many more bytes are needed.
    Needs(usize),
}

const fn is_known(tag: u8) -> bool {
    matches!(
        tag,
        b'R' | b'K'
            | b'S'
            | b'v'
            | b'E'
            | b'N'
            | b'A'
            | b'T'
            | b'D'
            | b'C'
            | b'I'
            | b'Z'
            | b'G'
            | b'H'
            | b'W'
            | b'd'
            | b'c'
    )
}

fn parse(tag: u8, mut body: Bytes) -> Option<Message> {
    Some(match tag {
        b'd' => Message::CopyData(body),
        b'R' => Message::Authentication(authentication(body)?),
        b'K' => Message::BackendKeyData,
        b'S' => Message::ParameterStatus { name: text(&mut body)?, value: text(&mut body)? },
        b'v' => Message::NegotiateProtocolVersion,
        b'E' => Message::Error(server_error(body)?),
        b'N' => Message::Notice(server_error(body)?),
        b'A' => Message::Notification,
        b'T' => Message::RowDescription(row_description(body)?),
        b'D' => Message::DataRow(row(body)?),
        b'C' => Message::CommandComplete(text(&mut body)?),
        b'I' => Message::EmptyQuery,
        b'Z' => Message::Ready,
        b'G' => Message::CopyIn,
        b'H' => Message::CopyOut,
        b'W' => Message::CopyBoth,
        b'c' => Message::CopyDone,
        _ => return None,
    })
}

fn authentication(mut body: Bytes) -> Option<Authentication> {
    Some(match body.try_get_i32().ok()? {
        0 => Authentication::Ok,
        3 => Authentication::CleartextPassword,
        5 => Authentication::Md5Password { salt: body.as_ref().try_into().ok()? },
        10 => {
            let mut mechanisms = Vec::new();
            loop {
                let mechanism = text(&mut body)?;
                if mechanism.is_empty() {
                    break;
                }
                mechanisms.push(mechanism);
            }
            Authentication::Sasl { mechanisms }
        }
        11 => Authentication::SaslContinue(body),
        12 => Authentication::SaslFinal(body),
        other => Authentication::Unsupported(other),
    })
}

fn server_error(mut body: Bytes) -> Option<ServerError> {
    let mut error = ServerError::default();
    loop {
        let field = body.try_get_u8().ok()?;
        if field == 0 {
            return Some(error);
        }
        let value = text(&mut body)?;
        match field {
            // `V` is `S` untranslated and comes after it; every server since 9.6 sends both.
            b'S' | b'V' => error.severity = value,
            b'C' => error.code = value,
            b'M' => error.message = value,
            b'D' => error.detail = Some(value),
            b'H' => error.hint = Some(value),
            b'R' => error.routine = Some(value),
            _ => {}
        }
    }
}

fn row_description(mut body: Bytes) -> Option<Vec<String>> {
    // Table, column number, type, type length, type modifier, format: nothing here depends on them.
    const REST: usize = 18;
    let count = body.try_get_u16().ok()?;
    let mut names = Vec::new();
    for _ in 0..count {
        names.push(text(&mut body)?);
        if body.len() < REST {
            return None;
        }
        body.advance(REST);
    }
    Some(names)
}

fn row(mut body: Bytes) -> Option<Row> {
    let count = body.try_get_u16().ok()?;
    let mut values = Vec::new();
    for _ in 0..count {
        let length = body.try_get_i32().ok()?;
        values.push(match usize::try_from(length) {
            Err(_) => None,
            Ok(length) if length <= body.len() => Some(body.split_to(length)),
            Ok(_) => return None,
        });
    }
    Some(Row(values))
}

/// A string that ends with a zero byte. The server's language may not be UTF-8 before the session is
/// set up, so that such bytes are replaced, not refused.
fn text(body: &mut Bytes) -> Option<String> {
    let end = body.iter().position(|&byte| byte == 0)?;
    let text = String::from_utf8_lossy(&body.split_to(end)).into_owned();
    body.advance(1);
    Some(text)
}

/// Writes the messages that pgkeep sends.
pub mod frontend {
    use super::{BufMut, BytesMut};

    fn message(out: &mut BytesMut, tag: u8, body: &[&[u8]]) {
        let length = 4 + body.iter().map(|part| part.len()).sum::<usize>();
        out.put_u8(tag);
        out.put_u32(u32::try_from(length).expect("what pgkeep sends is far below 4 GiB"));
        for part in body {
            out.put_slice(part);
        }
    }

    /// The first message of a session, protocol 3.0. A zero byte in a value would end it early, so such
    /// bytes are left out.
    pub fn startup(out: &mut BytesMut, parameters: &[(&str, &str)]) {
        let mut body = Vec::new();
        for (name, value) in parameters {
            for text in [name, value] {
                body.extend(text.bytes().filter(|&byte| byte != 0));
                body.push(0);
            }
        }
        body.push(0);
        out.put_u32(u32::try_from(body.len() + 8).expect("startup parameters are short"));
        out.put_u32(3 << 16);
        out.put_slice(&body);
    }

    /// Asks whether the server speaks TLS; it answers with the single byte `S` or `N`.
    pub fn tls_request(out: &mut BytesMut) {
        out.put_u32(8);
        out.put_u32(80_877_103);
    }

    /// A query of the simple protocol; replication commands know no other.
    pub fn query(out: &mut BytesMut, text: &str) {
        message(out, b'Q', &[text.as_bytes(), &[0]]);
    }

    /// A password, or its MD5 form.
    pub fn password(out: &mut BytesMut, password: &[u8]) {
        message(out, b'p', &[password, &[0]]);
    }

    pub fn sasl_initial_response(out: &mut BytesMut, mechanism: &str, data: &[u8]) {
        let length = u32::try_from(data.len()).expect("a SCRAM message is short");
        message(out, b'p', &[mechanism.as_bytes(), &[0], &length.to_be_bytes(), data]);
    }

    pub fn sasl_response(out: &mut BytesMut, data: &[u8]) {
        message(out, b'p', &[data]);
    }

    pub fn copy_data(out: &mut BytesMut, data: &[u8]) {
        message(out, b'd', &[data]);
    }

    pub fn copy_done(out: &mut BytesMut) {
        message(out, b'c', &[]);
    }

    pub fn terminate(out: &mut BytesMut) {
        message(out, b'X', &[]);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes what a server would send; also the script language of this room's other tests.
    pub fn encode(message: &Message) -> Vec<u8> {
        let mut body = BytesMut::new();
        let fields = |body: &mut BytesMut, error: &ServerError| {
            let mut field = |tag, value: &str| {
                body.put_u8(tag);
                string(body, value);
            };
            field(b'S', "FEHLER");
            field(b'V', &error.severity);
            field(b'C', &error.code);
            field(b'M', &error.message);
            for (tag, value) in [(b'D', &error.detail), (b'H', &error.hint), (b'R', &error.routine)] {
                if let Some(value) = value {
                    field(tag, value);
                }
            }
            body.put_u8(0);
        };
        let tag = match message {
            Message::Authentication(step) => {
                authentication_step(step, &mut body);
                b'R'
            }
            Message::BackendKeyData => b'K',
            Message::ParameterStatus { name, value } => {
                string(&mut body, name);
                string(&mut body, value);
                b'S'
            }
            Message::NegotiateProtocolVersion => b'v',
            Message::Error(error) => {
                fields(&mut body, error);
                b'E'
            }
            Message::Notice(error) => {
                fields(&mut body, error);
                b'N'
            }
            Message::Notification => b'A',
            Message::RowDescription(names) => {
                body.put_u16(u16::try_from(names.len()).unwrap());
                for name in names {
                    string(&mut body, name);
                    body.put_slice(&[0; 18]);
                }
                b'T'
            }
            Message::DataRow(row) => {
                body.put_u16(u16::try_from(row.0.len()).unwrap());
                for value in &row.0 {
                    match value {
                        None => body.put_i32(-1),
                        Some(value) => {
                            body.put_i32(i32::try_from(value.len()).unwrap());
                            body.put_slice(value);
                        }
                    }
                }
                b'D'
            }
            Message::CommandComplete(tag) => {
                string(&mut body, tag);
                b'C'
            }
            Message::EmptyQuery => b'I',
            Message::Ready => {
                body.put_u8(b'I');
                b'Z'
            }
            Message::CopyIn => b'G',
            Message::CopyOut => b'H',
            Message::CopyBoth => b'W',
            Message::CopyData(data) => {
                body.put_slice(data);
                b'd'
            }
            Message::CopyDone => b'c',
        };
        let mut out = vec![tag];
        out.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        out.extend(body);
        out
    }

    fn string(body: &mut BytesMut, text: &str) {
        body.put_slice(text.as_bytes());
        body.put_u8(0);
    }

    fn authentication_step(step: &Authentication, body: &mut BytesMut) {
        match step {
            Authentication::Ok => body.put_i32(0),
            Authentication::CleartextPassword => body.put_i32(3),
            Authentication::Md5Password { salt } => {
                body.put_i32(5);
                body.put_slice(salt);
            }
            Authentication::Sasl { mechanisms } => {
                body.put_i32(10);
                for mechanism in mechanisms {
                    string(body, mechanism);
                }
                body.put_u8(0);
            }
            Authentication::SaslContinue(data) => {
                body.put_i32(11);
                body.put_slice(data);
            }
            Authentication::SaslFinal(data) => {
                body.put_i32(12);
                body.put_slice(data);
            }
            Authentication::Unsupported(number) => body.put_i32(*number),
        }
    }

    fn arbitrary_message() -> impl Strategy<Value = Message> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
        let error = ("[A-Z]{1,7}", "[0-9A-Z]{5}", "[a-z ]{0,40}", prop::option::of("[a-z]{0,9}")).prop_map(
            |(severity, code, message, detail)| ServerError {
                severity,
                code,
                message,
                detail,
                ..ServerError::default()
            },
        );
        prop_oneof![
            bytes().prop_map(Message::CopyData),
            bytes().prop_map(|data| Message::Authentication(Authentication::SaslContinue(data))),
            any::<[u8; 4]>().prop_map(|salt| Message::Authentication(Authentication::Md5Password { salt })),
            prop::collection::vec("[A-Z-]{1,9}", 0..4)
                .prop_map(|mechanisms| Message::Authentication(Authentication::Sasl { mechanisms })),
            ("[a-z_]{1,9}", "[a-zé]{0,9}").prop_map(|(name, value)| Message::ParameterStatus { name, value }),
            error.clone().prop_map(Message::Error),
            error.prop_map(Message::Notice),
            prop::collection::vec("[a-z]{0,9}", 0..5).prop_map(Message::RowDescription),
            prop::collection::vec(prop::option::of(bytes()), 0..5)
                .prop_map(|values| Message::DataRow(Row(values))),
            "[A-Z 0-9]{0,20}".prop_map(Message::CommandComplete),
            Just(Message::Ready),
            Just(Message::CopyBoth),
            Just(Message::CopyOut),
            Just(Message::CopyIn),
            Just(Message::CopyDone),
            Just(Message::NegotiateProtocolVersion),
            Just(Message::Notification),
            Just(Message::BackendKeyData),
            Just(Message::EmptyQuery),
        ]
    }

    proptest! {
        #[test]
        fn any_split_of_the_stream_gives_the_same_messages(
            messages in prop::collection::vec(arbitrary_message(), 0..12),
            cuts in prop::collection::vec(1_usize..200, 1..40),
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(encode).collect();
            let mut rest = stream.as_slice();
            let mut inbox = BytesMut::new();
            let mut got = Vec::new();
            let mut cuts = cuts.iter().cycle();
            loop {
                match Message::take(&mut inbox, MAX_MESSAGE).unwrap() {
                    Step::Message(message) => got.push(message),
                    Step::Needs(missing) => {
                        prop_assert!(missing > 0);
                        if rest.is_empty() {
                            break;
                        }
                        let (now, later) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                        inbox.extend_from_slice(now);
                        rest = later;
                    }
                }
            }
            prop_assert!(inbox.is_empty());
            prop_assert_eq!(got, messages);
        }

        #[test]
        fn garbage_is_refused_or_waited_for_but_never_panics(
            tag in prop::sample::select(b"RKSvENATDCIZGHWdcxy".as_slice()),
            body in prop::collection::vec(any::<u8>(), 0..64),
            noise in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut framed = vec![tag];
            framed.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
            framed.extend(&body);
            for bytes in [framed, noise] {
                let mut inbox = BytesMut::from(bytes.as_slice());
                while let Ok(Step::Message(_)) = Message::take(&mut inbox, MAX_GREETING) {}
            }
        }
    }

    #[test]
    fn a_web_server_is_not_waited_for() {
        let mut inbox = BytesMut::from("HTTP/1.1 400 Bad Request");
        assert!(matches!(
            Message::take(&mut inbox, MAX_GREETING),
            Err(WireError::TooLong { tag: 'H', limit: MAX_GREETING, .. })
        ));
    }

    #[test]
    fn severity_is_the_untranslated_one() {
        let error = ServerError { severity: "FATAL".into(), code: "57P03".into(), ..Default::default() };
        let mut inbox = BytesMut::from(encode(&Message::Error(error)).as_slice());
        let Step::Message(Message::Error(error)) = Message::take(&mut inbox, 1000).unwrap() else {
            panic!("an error message")
        };
        assert_eq!(error.severity, "FATAL");
        assert!(error.ends_session());
    }

    #[test]
    fn encoders_write_what_the_manual_says() {
        let mut out = BytesMut::new();
        frontend::startup(&mut out, &[("user", "a\0b")]);
        assert_eq!(&out[..], b"\0\0\0\x11\0\x03\0\0user\0ab\0\0");
        out.clear();
        frontend::query(&mut out, "SHOW x");
        assert_eq!(&out[..], b"Q\0\0\0\x0bSHOW x\0");
        out.clear();
        frontend::sasl_initial_response(&mut out, "M", b"xy");
        assert_eq!(&out[..], b"p\0\0\0\x0cM\0\0\0\0\x02xy");
    }
}
