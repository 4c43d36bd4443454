//! HTTP on port 16000.

mod join;
mod new_file;
mod route;
