//! Restoring: target, plan (pure), apply.

mod target;

pub use target::{
    ParseTargetError, RecoveryTarget, TargetAction, TargetTimeline, quote_setting, setting_line,
    target_settings,
};
