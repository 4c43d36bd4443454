//! What to keep and why (pure), and carrying it out.

mod apply;
mod policy;

pub use apply::{PruneReport, apply, wal_dropped};
pub use policy::{
    BackupDecision, CutExtent, PackRule, RetentionPlan, RetentionPolicy, SweepDecision, UNFINISHED_AGE,
    Verdict, WalCut, WalPlan, plan,
};
