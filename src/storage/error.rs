//! What went wrong at the store, by consequence.

use std::error::Error as StdError;
use std::io;

use super::local::RootMissing;

/// An operation that the store did not carry out, or of which that is not known.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The bucket or the root directory is not there: nothing is known about any object.
    #[error("cannot {operation}: `{store}` is not there ({detail})")]
    Missing { store: String, operation: &'static str, detail: String },
    #[error("cannot {operation} in `{store}`: access denied ({detail})")]
    Denied { store: String, operation: &'static str, detail: String },
    #[error("cannot {operation} in `{store}`: it is read-only ({detail})")]
    ReadOnly { store: String, operation: &'static str, detail: String },
    #[error("cannot {operation} in `{store}`: no space left ({detail})")]
    Full { store: String, operation: &'static str, detail: String },
    /// The settings cannot work.
    #[error("cannot use `{store}`: {reason}")]
    Misconfigured { store: String, reason: String },
    /// The store answered, and refused for a reason that waiting does not mend.
    #[error("cannot {operation} in `{store}`: {detail}")]
    Refused { store: String, operation: &'static str, detail: String },
    /// No answer, or one that may be another next time.
    #[error("cannot {operation} in `{store}`: {detail}")]
    Unavailable { store: String, operation: &'static str, detail: String },
}

impl Error {
    /// Whether the same operation may succeed later without anybody changing the configuration.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Full { .. } | Self::Unavailable { .. })
    }

    /// Whether the store refused for want of rights.
    pub const fn is_denied(&self) -> bool {
        matches!(self, Self::Denied { .. } | Self::ReadOnly { .. })
    }

    /// The next step for the operator.
    pub fn hint(&self) -> Option<String> {
        let local = |store: &str| store.starts_with("file://");
        Some(match self {
            Self::Missing { store, .. } if local(store) => {
                "check that the directory exists and that its file system is mounted".to_owned()
            }
            Self::Missing { store, .. } => {
                format!("create the bucket of `{store}`, or check its name, the region and the endpoint")
            }
            Self::Denied { store, .. } if local(store) => {
                "give the user that runs pgkeep read and write permission for the directory".to_owned()
            }
            Self::Denied { operation, .. } => format!(
                "check the access key, and that its policy allows to {operation} \
                 (s3:ListBucket on the bucket; s3:GetObject, s3:PutObject, s3:DeleteObject on its objects)"
            ),
            Self::ReadOnly { .. } => {
                "remount the file system for writing, or choose another directory".to_owned()
            }
            Self::Full { .. } => {
                "free some space (`pgkeep prune` deletes what the retention policy no longer needs)"
                    .to_owned()
            }
            Self::Unavailable { store, .. } if !local(store) => {
                "check that the endpoint can be reached from here".to_owned()
            }
            Self::Misconfigured { .. } | Self::Refused { .. } | Self::Unavailable { .. } => return None,
        })
    }

    /// Sorts an error of the object store. `NotFound` and `AlreadyExists` of single objects are answers,
    /// not failures: the rooms above look at them first.
    pub(crate) fn classify(store: &str, operation: &'static str, error: &object_store::Error) -> Self {
        use object_store::Error as Store;
        let (store, detail) = (store.to_owned(), cause(error));
        if let Some(kind) = io_kind(error) {
            match kind {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    return Self::Full { store, operation, detail };
                }
                io::ErrorKind::ReadOnlyFilesystem => return Self::ReadOnly { store, operation, detail },
                io::ErrorKind::PermissionDenied => return Self::Denied { store, operation, detail },
                _ => {}
            }
        }
        if chain(error).any(<dyn StdError>::is::<RootMissing>) {
            return Self::Missing { store, operation, detail };
        }
        // Of an error in a listing the library gives no more than its text.
        match status(error) {
            Some(404) => return Self::Missing { store, operation, detail },
            Some(401 | 403) => return Self::Denied { store, operation, detail },
            Some(408 | 429) => return Self::Unavailable { store, operation, detail },
            Some(300..500) => return Self::Refused { store, operation, detail },
            _ => {}
        }
        match error {
            Store::NotFound { .. } => Self::Missing { store, operation, detail },
            Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => {
                Self::Denied { store, operation, detail }
            }
            Store::NotSupported { .. }
            | Store::NotImplemented { .. }
            | Store::InvalidPath { .. }
            | Store::UnknownConfigurationKey { .. } => Self::Refused { store, operation, detail },
            _ => Self::Unavailable { store, operation, detail },
        }
    }

    pub(crate) fn from_io(store: &str, operation: &'static str, error: io::Error) -> Self {
        let missing = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
        let detail = error.to_string();
        if missing {
            return Self::Missing { store: store.to_owned(), operation, detail };
        }
        let error = object_store::Error::Generic { store: "directory", source: Box::new(error) };
        Self::classify(store, operation, &error)
    }
}

/// The HTTP status in the text of an error; the library keeps the type that has it to itself.
fn status(error: &object_store::Error) -> Option<u16> {
    let text = error.to_string();
    if text.contains("redirect without LOCATION") {
        return Some(301);
    }
    let (_, rest) = text.split_once("non-2xx status code: ")?;
    rest.get(..3)?.parse().ok()
}

fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

/// The kind of the deepest operating system error below `error`.
pub(super) fn io_kind(error: &(dyn StdError + 'static)) -> Option<io::ErrorKind> {
    chain(error)
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .filter(|error| error.raw_os_error().is_some())
        .map(io::Error::kind)
        .last()
}

/// The innermost reason in one line; of an answer of S3, its code and message instead of its XML.
fn cause(error: &(dyn StdError + 'static)) -> String {
    let text = chain(error).last().map(ToString::to_string).unwrap_or_default();
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once('<').map(|(value, _)| value)
    };
    let text = match (element("Code"), element("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_owned(),
        _ => text,
    };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = line.trim_end_matches(['.', ':']);
    match line.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: impl Into<Box<dyn StdError + Send + Sync>>) -> object_store::Error {
        object_store::Error::Generic { store: "S3", source: source.into() }
    }

    #[test]
    fn the_operating_system_decides_about_a_directory() {
        let classify = |code| {
            let error = generic(io::Error::from_raw_os_error(code));
            Error::classify("file:///backups", "write an object", &error)
        };
        assert!(matches!(classify(28), Error::Full { .. }));
        assert!(matches!(classify(30), Error::ReadOnly { .. }));
        assert!(matches!(classify(13), Error::Denied { .. }));
        assert!(matches!(classify(5), Error::Unavailable { .. }));
        assert_eq!(
            classify(28).to_string(),
            "cannot write an object in `file:///backups`: no space left (No space left on device (os error 28))"
        );
        assert!(classify(28).is_transient() && !classify(13).is_transient() && classify(30).is_denied());
    }

    #[test]
    fn an_answer_of_s3_is_told_without_its_xml() {
        let body = "<?xml version=\"1.0\"?>\n<Error><Code>AccessDenied</Code>\
                    <Message>Access Denied.</Message><Resource>/b</Resource></Error>";
        let error = object_store::Error::PermissionDenied {
            path: "x".into(),
            source: format!("Server returned non-2xx status code: 403 Forbidden: {body}").into(),
        };
        let error = Error::classify("s3://b", "list objects", &error);
        assert_eq!(
            error.to_string(),
            "cannot list objects in `s3://b`: access denied (AccessDenied: Access Denied)"
        );
        assert!(error.hint().unwrap().contains("s3:ListBucket"));
    }

    #[test]
    fn a_refusal_is_not_retried_and_a_server_error_is() {
        let of = |status: &str| {
            let error = generic(format!("Server returned non-2xx status code: {status}: "));
            Error::classify("s3://b", "read an object", &error).is_transient()
        };
        assert!(!of("400 Bad Request"));
        assert!(of("503 Service Unavailable") && of("429 Too Many Requests") && of("500 Internal"));
        assert!(Error::classify("s3://b", "read an object", &generic("connection refused")).is_transient());
    }
}
