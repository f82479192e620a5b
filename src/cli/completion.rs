//! `geminga completion`: what a shell needs to complete commands and flags.

use std::io::{self, Write};

use clap::CommandFactory;
use clap_complete::{Shell, generate};

use super::{Cli, exit::Failure};

const AFTER_HELP: &str = "\
bash:  geminga completion bash > ~/.local/share/bash-completion/completions/geminga
zsh:   geminga completion zsh > \"${fpath[1]}/_geminga\"
fish:  geminga completion fish > ~/.config/fish/completions/geminga.fish";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct CompletionArgs {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run(args: &CompletionArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    generate(args.shell, &mut Cli::command(), "geminga", &mut script);
    let mut out = io::stdout().lock();
    out.write_all(&script)?;
    Ok(out.flush()?)
}
