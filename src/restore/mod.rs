//! Restoring: target, plan (pure), apply.
