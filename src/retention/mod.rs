//! What to keep and why (pure), and carrying it out.

mod apply;
mod pghoard;
mod policy;

pub use apply::{PruneReport, apply, wal_dropped};
pub use pghoard::survey;
pub use policy::{
    BackupDecision, CutExtent, PackRule, RetentionPlan, RetentionPolicy, SweepDecision, UNFINISHED_AGE,
    Verdict, WalCut, WalPlan, plan,
};
