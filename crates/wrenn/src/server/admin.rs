//! `wrenn admin`: what an operator does on the database itself, without logging in.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use wrenn_control::{ControlPlane, Secret};

use super::config::{ControlArgs, DirArgs};

/// `wrenn admin`.
#[derive(Debug, Clone, Args)]
pub(crate) struct AdminArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Clone, Subcommand)]
enum What {
    /// Create a platform admin, or make an account that exists one. Asks for the password, or reads a line of
    /// standard input
    Create {
        /// Address of the account
        #[arg(long, value_name = "ADDRESS")]
        email: String,
        /// What others see [default: the address up to its @]
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        #[command(flatten)]
        place: Place,
    },
    /// Set an account's password (also the first one of admin@localhost), and end its sessions. Asks for the
    /// password, or reads a line of standard input
    SetPassword {
        /// Address of the account
        #[arg(long, value_name = "ADDRESS")]
        email: String,
        #[command(flatten)]
        place: Place,
    },
}

/// Which database.
#[derive(Debug, Clone, Args)]
struct Place {
    #[command(flatten)]
    dirs: DirArgs,
    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn main(args: AdminArgs, json: bool) -> anyhow::Result<()> {
    let (What::Create { place, .. } | What::SetPassword { place, .. }) = &args.what;
    let data_dir = place.dirs.data_dir();
    super::up::prepare(&data_dir)?;
    let control = super::up::open_control(&data_dir, &place.control).await?;
    let outcome = act(&control, &args.what, json).await;
    control.stop().await;
    outcome
}

async fn act(control: &ControlPlane, what: &What, json: bool) -> anyhow::Result<()> {
    let result = |user: Option<&str>, email: &str| {
        if json {
            crate::cli::print_json(&serde_json::json!({ "id": user, "email": email }));
        } else if let Some(user) = user {
            crate::cli::print_bytes(format!("{user}\n").as_bytes());
        }
    };
    let note = |text: String| crate::cli::told::hint(json, &text);
    match what {
        What::Create {
            email,
            name,
            place: _,
        } => {
            if let Some(user) = control.grant_platform_admin(email).await? {
                result(Some(&user.to_string()), email);
                note(format!(
                    "The account {email} is a platform admin now; its password stays as it was."
                ));
                return Ok(());
            }
            let password = ask().await?;
            let user = control
                .create_platform_admin(email, name.as_deref(), &password)
                .await?;
            result(Some(&user.to_string()), email);
            note(format!("The platform admin {email} was created."));
        }
        What::SetPassword { email, place: _ } => {
            let password = ask().await?;
            control.set_password(email, &password).await?;
            result(None, email);
            note(format!(
                "The password of {email} was set; its sessions have ended."
            ));
        }
    }
    Ok(())
}

/// A password never stands among a command's arguments, which everybody on the machine can read.
async fn ask() -> anyhow::Result<Secret> {
    tokio::task::spawn_blocking(|| {
        if !std::io::stdin().is_terminal() {
            return line();
        }
        let password = prompt("New password: ")?;
        if prompt("Again: ")? != password {
            bail!("the two passwords differ; nothing was changed");
        }
        Ok(password)
    })
    .await?
}

fn prompt(text: &str) -> anyhow::Result<Secret> {
    let _quiet = Quiet::begin()?;
    eprint!("{text}");
    std::io::stderr().flush()?;
    let answer = line();
    eprintln!();
    answer
}

fn line() -> anyhow::Result<Secret> {
    let mut text = String::new();
    let read = std::io::stdin()
        .lock()
        .read_line(&mut text)
        .context("cannot read the password")?;
    if read == 0 {
        bail!("a password is needed on standard input");
    }
    Ok(Secret::new(text.trim_end_matches(['\r', '\n'])))
}

/// A terminal that does not show what is typed, for as long as this lives.
struct Quiet(Termios);

impl Quiet {
    fn begin() -> anyhow::Result<Self> {
        let before = tcgetattr(std::io::stdin()).context("cannot read the terminal's settings")?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &quiet)
            .context("cannot keep the terminal from showing the password")?;
        Ok(Self(before))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0) {
            eprintln!("wrenn: the terminal could not be set back ({error}); `stty echo` does it");
        }
    }
}
