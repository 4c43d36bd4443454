//! What to keep and why (pure), and carrying it out.
