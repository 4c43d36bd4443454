use std::process::ExitCode;

fn main() -> ExitCode {
    pgkeep::cli::main(std::env::args_os())
}
