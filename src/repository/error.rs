//! What callers have to tell apart.

use super::name::ObjectName;
use crate::codec::{EnvelopeError, KeyError};
use crate::{codec, storage};

/// Why an object was not read or written.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The store says so, and the store itself was seen to be there.
    #[error("object `{0}` does not exist")]
    NotFound(ObjectName),
    /// The name is taken by other content, which stays.
    #[error("object `{name}` exists with other content ({existing} bytes there, {offered} bytes offered)")]
    Conflict { name: ObjectName, existing: u64, offered: u64 },
    /// What was read is not what was stored.
    #[error("object `{name}` is damaged: {why}")]
    Damaged { name: ObjectName, why: String },
    #[error("object `{name}` has more than {limit} bytes")]
    TooLarge { name: ObjectName, limit: u64 },
    /// It may work later; nothing is known about the object until then.
    #[error("{subject}: {cause}")]
    Transient { subject: String, cause: storage::Error },
    /// It will not work before somebody changes something.
    #[error("{subject}: {cause}")]
    Permanent { subject: String, denied: bool, cause: storage::Error },
    /// Encrypted for a key that is not at hand.
    #[error("object `{name}` cannot be opened: {why}")]
    Locked { name: ObjectName, why: String, hint: Option<String> },
    /// Written in a way this version cannot read.
    #[error("object `{name}` cannot be read: {what}")]
    Unsupported { name: ObjectName, what: String },
}

impl Error {
    pub const fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound(_))
    }

    pub const fn is_locked(&self) -> bool {
        matches!(self, Self::Locked { .. })
    }

    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Transient { .. })
    }

    /// The next step for the operator.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound(_) | Self::TooLarge { .. } => None,
            Self::Conflict { .. } => Some(
                "another cluster or another agent writes to this site; give each cluster a site of its own, \
                 and look at the stored object before removing it"
                    .to_owned(),
            ),
            Self::Damaged { .. } => {
                Some("compare it with a copy of the bucket; a new base backup makes a new start".to_owned())
            }
            Self::Transient { cause, .. } | Self::Permanent { cause, .. } => cause.hint(),
            Self::Locked { hint, .. } => hint.clone(),
            Self::Unsupported { .. } => Some("use a newer pgkeep, or the program that wrote it".to_owned()),
        }
    }

    pub(super) fn of_store(subject: impl Into<String>, cause: storage::Error) -> Self {
        let subject = subject.into();
        if cause.is_transient() {
            Self::Transient { subject, cause }
        } else {
            Self::Permanent { subject, denied: cause.is_denied(), cause }
        }
    }

    /// What the stored bytes turned out to be.
    pub(super) fn of_content(name: ObjectName, error: &codec::Error) -> Self {
        let why = error.to_string();
        match error {
            codec::Error::Envelope(EnvelopeError::Refused(_)) => {
                let hint = "restore with the private part of the key that the object was written with";
                Self::Locked { name, why, hint: Some(hint.to_owned()) }
            }
            _ => Self::Damaged { name, why },
        }
    }

    pub(super) fn locked(name: ObjectName, error: &KeyError) -> Self {
        Self::Locked { name, why: error.to_string(), hint: error.hint() }
    }
}
