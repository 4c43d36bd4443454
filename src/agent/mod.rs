//! The daemon: one supervised task set per site; wiring, no domain logic.
