//! Restoring: target, plan (pure), apply.

mod plan;
mod target;

pub use plan::{PlanError, Reach, RestorePlan, WindowText, plan};
pub use target::{
    ParseTargetError, RecoveryTarget, TargetAction, TargetTimeline, quote_setting, setting_line,
    target_settings,
};
