//! Confirmation of what concerns all users of an app, or everyone.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use anyhow::bail;

use crate::output::Coded;

/// What a command is about to do.
pub struct Step<'a> {
    /// The option or command, as it was given.
    pub given: &'a str,
    /// The effect, as a clause of which the command is the subject: `closes all sessions of app shop`.
    pub effect: &'a str,
    /// The word to type.
    pub word: &'a str,
}

/// The option of commands that ask for confirmation.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct ConfirmArgs {
    /// Do not ask for confirmation where an app or everyone is concerned. Needed if standard input is no terminal
    #[arg(long)]
    pub yes: bool,
}

impl ConfirmArgs {
    /// Asks on the terminal, unless `--yes` is given.
    ///
    /// # Errors
    /// Returns an error if there is no terminal, or another word is typed.
    pub fn ask(self, step: &Step<'_>) -> anyhow::Result<()> {
        let Step { given, effect, word } = step;
        if self.yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            bail!(Coded::config(format!("{given} {effect}: add --yes where no terminal can ask")));
        }
        write!(io::stderr(), "{given} {effect}. Type {word} to go on: ")?;
        let mut typed = String::new();
        io::stdin().lock().read_line(&mut typed)?;
        match typed.trim() == *word {
            true => Ok(()),
            false => bail!("not confirmed with {word}: nothing was done"),
        }
    }
}
