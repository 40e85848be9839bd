//! Passphrases: asked for on the terminal without echo, or read from a file.
//!
//! Holds: a passphrase is never on the command line, never printed, and wiped from memory after
//! use. A new one that is typed is typed twice.

use std::{fs::File, io::Read as _, path::Path};

use postern_trusted::volume::SlotKey;
use zeroize::Zeroizing;

use crate::{
    cli::PassphraseArgs,
    error::{Exit, Failure},
};

/// Longest passphrase in bytes.
const LONGEST: usize = 4096;

/// Whether a passphrase is in use already or about to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// It opens something.
    Known,
    /// It will: a slip of the finger would lose what it seals.
    New,
}

impl PassphraseArgs {
    /// The passphrase that the command line asks for; `None` if it does not.
    ///
    /// # Errors
    /// [`Exit::Key`] if it cannot be had, is empty, or was typed in two ways.
    pub fn get(&self, age: Age) -> Result<Option<SlotKey>, Failure> {
        match &self.passphrase_file {
            Some(path) => read(path).map(Some),
            None if self.passphrase => ask(age).map(Some),
            None => Ok(None),
        }
    }
}

fn failed(what: &str, place: &Path, advice: &str) -> Failure {
    Failure::new(Exit::Key, what, place.display(), advice)
}

/// Reads the passphrase in `path`, standard input for `-`.
///
/// # Errors
/// [`Exit::Key`] if it cannot be read, is empty or too long.
pub fn read(path: &Path) -> Result<SlotKey, Failure> {
    let advice = "give a file that holds the passphrase on one line";
    let cannot = |error: std::io::Error| {
        failed(&format!("cannot read the passphrase: {error}"), path, advice)
    };
    // One byte more than the longest with its newline, so that a longer one is seen to be longer.
    let mut text = Zeroizing::new([0_u8; LONGEST + 2]);
    let mut length = 0;
    let mut file: Box<dyn std::io::Read> = match path.to_str() {
        Some("-") => Box::new(std::io::stdin()),
        _ => Box::new(File::open(path).map_err(cannot)?),
    };
    while length < text.len() {
        match file.read(&mut text[length..]) {
            Ok(0) => break,
            Ok(n) => length += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(cannot(error)),
        }
    }
    let text = &text[..length];
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    match text.len() {
        0 => Err(failed("the passphrase is empty", path, advice)),
        1..=LONGEST => Ok(SlotKey::passphrase(text)),
        _ => Err(failed("the passphrase is longer than 4096 bytes", path, "use a key file")),
    }
}

/// Asks on the terminal.
///
/// # Errors
/// [`Exit::Key`] if there is no terminal, nothing was typed, or not the same twice.
pub fn ask(age: Age) -> Result<SlotKey, Failure> {
    let terminal = Path::new("terminal");
    let prompt = |words: &str| {
        rpassword::prompt_password(words).map(Zeroizing::new).map_err(|error| {
            let advice = "run it on a terminal, or give --passphrase-file FILE";
            failed(&format!("cannot ask for the passphrase: {error}"), terminal, advice)
        })
    };
    let first = prompt(if age == Age::New { "New passphrase: " } else { "Passphrase: " })?;
    if first.is_empty() {
        return Err(failed("the passphrase is empty", terminal, "type at least one character"));
    }
    if age == Age::New && prompt("Once more: ")? != first {
        return Err(failed(
            "the two passphrases differ",
            terminal,
            "nothing was changed; try again",
        ));
    }
    Ok(SlotKey::passphrase(first.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gives_its_bytes_without_one_newline_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        for (content, fine) in [
            (&b""[..], false),
            (b"\n", false),
            (b"\n\n", true),
            (b"two words\n", true),
            (&[b'x'; LONGEST], true),
            (&[b'x'; LONGEST + 1], false),
            (&[b'x'; 3 * LONGEST], false),
        ] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(read(&path).is_ok(), fine, "{} bytes", content.len());
        }
        assert_eq!(read(&dir.path().join("none")).unwrap_err().exit, Exit::Key);
    }
}
