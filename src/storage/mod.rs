//! The configured object store and nothing above it. Keys are opaque here.
