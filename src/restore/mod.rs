//! Restoring: target and plan (pure), then files and recovery settings.

mod apply;
mod contents;
mod error;
mod plan;
mod recovery;
mod target;

pub use apply::{Found, TablespaceTarget, Work, finish, look_at, may_fill, restore_files};
pub use contents::restore_contents;
pub use error::Error;
pub use plan::{PlanError, Reach, RestorePlan, WindowText, plan};
pub use recovery::{Recovery, restore_command, shell_word};
pub use target::{
    ParseTargetError, RecoveryTarget, TargetAction, TargetTimeline, quote_setting, setting_line,
    target_settings,
};
