//! Log and progress.
