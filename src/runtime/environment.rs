//! The one place that reads the process's environment.
//!
//! Everything else is given a [`Lookup`], so that what a function depends on is visible in its
//! signature and a test needs no global state.

/// Finds the value of an environment variable.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The real environment. A variable that is empty or not UTF-8 counts as not set: `PGHOST=` in a
/// manifest means "nothing here", as it does to libpq.
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
