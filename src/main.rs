//! The `geminga` binary: every role and every client tool. Thin: roles live in the crates below.

mod bench;
mod cli;
mod demo;
mod roles;
mod settings;
mod standalone;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
