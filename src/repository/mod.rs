//! Typed names, the one pipeline, receipts: everything of one site in one bucket and prefix.
