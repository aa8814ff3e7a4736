//! `wrenn`: the platform's servers and the user's command line in one binary.
//!
//! This module only parses and dispatches: the user's commands live in [`cli`], the servers' roles
//! beside it.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

mod bench;
mod cli;
mod server;

/// Sandboxes for untrusted code, each in its own microVM.
#[derive(Debug, Parser)]
#[command(name = "wrenn", version, max_term_width = 100, after_help = cli::EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    global: cli::GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    User(cli::UserCommand),

    #[command(flatten)]
    Server(Box<server::ServerCommand>),
    /// Measure what the platform costs on this machine, beside what it costs at least (see `make bench`)
    #[command(hide = true)]
    Bench(bench::BenchArgs),
    /// Print a completion script for a shell, for example `wrenn completions bash`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    // Before anything reads the environment, and before there is a second thread.
    let env_file = dotenvy::dotenv();
    let Cli { global, command } = match Cli::try_parse().map_err(cli::told::without_password) {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() && cli::told::wants_json(std::env::args_os()) => {
            eprintln!("{}", cli::told::usage_line(&error));
            return ExitCode::from(2);
        }
        Err(error) => error.exit(),
    };
    if let Err(error) = env_file
        && !error.not_found()
    {
        cli::told::warn(global.json, &format!("the file .env is not used: {error}"), None);
    }
    match command {
        Command::User(command) => cli::main(global, command),
        Command::Server(command) => server::main(*command, global.json),
        Command::Bench(args) => bench::main(&args, global.json),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "wrenn", &mut script);
            cli::print_bytes(&script)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
