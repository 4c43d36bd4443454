//! The few things every shell needs: clock, retry, tasks.
