//! Two proofs on a volume's host file: nothing plain is in it, and nothing altered passes.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _, Seek as _, SeekFrom},
    os::unix::fs::FileExt as _,
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use memchr::memmem;
use serde_json::Value;

use crate::{
    fio::{self, Way},
    shell::{Tree, answer, output},
};

/// What is written through the guest and looked for on the host: 16 bytes that no one else writes.
const PATTERN: &[u8; 16] = b"POSTERN-PLAIN-16";
/// Bytes of it.
const PATTERN_BYTES: u64 = 16 << 20;
const BLOCK: u64 = 4096;
/// Places tried before the integrity proof gives up; about one in two of a half-full volume is
/// live.
const PLACES_TRIED: u64 = 24;

/// The volume that the proofs are made on.
pub struct Subject<'a> {
    /// Path under which a guest sees it.
    pub guest_path: &'a str,
    /// Its host file.
    pub host_file: &'a Path,
    /// Its size as the guest sees it, bytes.
    pub bytes: u64,
    /// A directory for scratch files.
    pub scratch: &'a Path,
}

/// Writes a known plaintext through the guest and looks for it in the host file; then the same in
/// a plain file, as a control that the search finds what is there.
///
/// # Errors
/// If the host file holds the plaintext, or the control does not.
pub fn sealing(tree: &Tree, subject: &Subject<'_>) -> Result<()> {
    let hex: String = PATTERN.iter().map(|byte| format!("{byte:02x}")).collect();
    let write = |file: &str| {
        [
            "--name=pattern",
            &format!("--filename={file}"),
            "--ioengine=libaio",
            "--direct=1",
            "--rw=write",
            "--bs=64k",
            "--iodepth=8",
            &format!("--size={PATTERN_BYTES}"),
            &format!("--buffer_pattern=0x{hex}"),
            "--end_fsync=1",
        ]
        .map(str::to_owned)
    };
    let way = fio::through(subject.guest_path, subject.host_file);
    let sealed = fio::measure(tree, &way, &write(subject.guest_path), subject.scratch)?;
    ensure!(sealed.write.bytes == PATTERN_BYTES, "fio did not write the pattern to the volume");
    let plain = subject.scratch.join("plain");
    let control = fio::measure(tree, &Way::Raw, &write(&plain.to_string_lossy()), subject.scratch)?;
    ensure!(control.write.bytes == PATTERN_BYTES, "fio did not write the pattern to a plain file");

    let (in_sealed, searched) = occurrences(subject.host_file)?;
    let (in_plain, _) = occurrences(&plain)?;
    std::fs::remove_file(&plain)?;
    let written = PATTERN_BYTES / PATTERN.len() as u64;
    println!("written through the guest: {written} times `{}`", String::from_utf8_lossy(PATTERN));
    println!("found in the host file ({searched} bytes searched): {in_sealed}");
    println!("found in a plain file after the same write (control): {in_plain}");
    ensure!(in_plain == written, "the search does not find what is there");
    ensure!(in_sealed == 0, "the host file holds plaintext");
    Ok(())
}

/// How often [`PATTERN`] lies in `path`, and how many bytes were searched.
fn occurrences(path: &Path) -> Result<(u64, u64)> {
    const STEP: usize = 4 << 20;
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let finder = memmem::Finder::new(PATTERN);
    let keep = PATTERN.len() - 1;
    let mut buffer = vec![0; STEP + keep];
    let (mut carried, mut hits, mut searched) = (0, 0, 0);
    loop {
        let read = file.read(&mut buffer[carried..])?;
        if read == 0 {
            return Ok((hits, searched));
        }
        let end = carried + read;
        searched += read as u64;
        hits += finder.find_iter(&buffer[..end]).count() as u64;
        // A match may lie across the border: its beginning stays, too short to match by itself.
        carried = keep.min(end);
        buffer.copy_within(end - carried..end, 0);
    }
}

/// Flips one byte of a live block in the host file and shows that reading that block, and no
/// other, gives EIO; then puts the byte back.
///
/// # Errors
/// If altered data is read without an error, or more is lost than was altered.
pub fn integrity(tree: &Tree, subject: &Subject<'_>) -> Result<()> {
    let host = OpenOptions::new().read(true).write(true).open(subject.host_file)?;
    let Some((place, guest_block)) = flip_a_live_block(tree, subject, &host)? else {
        bail!("none of {PLACES_TRIED} places held a live block");
    };
    let at = guest_block * BLOCK;
    println!(
        "flipped one byte of the host file, in block {place}: it holds guest block {guest_block}"
    );
    let result = read_with_dd(tree, subject, guest_block);
    let others = read_all(tree, subject);
    // Back first, whatever came out.
    flip(&host, place)?;
    let said = result?;
    println!("dd of guest block {guest_block}: {said}");
    ensure!(said.contains("Input/output error"), "an altered block was read without EIO");
    let others = others?;
    println!(
        "fio over all {} blocks: {} read, {} gave an error",
        subject.bytes / BLOCK,
        others.read.ios.saturating_sub(others.errors),
        others.errors
    );
    ensure!(others.errors == 1, "one altered block, and {} errors", others.errors);
    let said = read_with_dd(tree, subject, guest_block)?;
    ensure!(!said.contains("error"), "the block does not read after it was mended: {said}");
    println!("flipped back: the guest's byte {at} reads again");
    Ok(())
}

/// Flips a byte in places of the host file's data until `postern verify` finds one damaged block.
fn flip_a_live_block(
    tree: &Tree,
    subject: &Subject<'_>,
    host: &File,
) -> Result<Option<(u64, u64)>> {
    let blocks = host.metadata()?.len() / BLOCK;
    for step in 0..PLACES_TRIED {
        // The data lies behind the header and the journal: the last three quarters, evenly.
        let place = blocks / 4 + step * (blocks / 2) / PLACES_TRIED;
        if !is_written(host, place)? {
            continue;
        }
        flip(host, place)?;
        let found = damaged(tree, subject);
        if let Ok([only]) = found.as_deref() {
            return Ok(Some((place, *only)));
        }
        flip(host, place)?;
        found?;
    }
    Ok(None)
}

/// Whether the host file has data at `place`, not a hole.
fn is_written(mut host: &File, place: u64) -> Result<bool> {
    host.seek(SeekFrom::Start(place * BLOCK))?;
    let mut block = [0; BLOCK as usize];
    match host.read_exact(&mut block) {
        Ok(()) => Ok(block.iter().any(|&byte| byte != 0)),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Inverts the byte in the middle of host block `place`.
fn flip(host: &File, place: u64) -> Result<()> {
    let at = place * BLOCK + BLOCK / 2;
    let mut byte = [0];
    host.read_exact_at(&mut byte, at)?;
    host.write_all_at(&[!byte[0]], at)?;
    host.sync_data()?;
    Ok(())
}

/// The guest blocks that `postern verify` names as damaged, at most the first few ranges.
fn damaged(tree: &Tree, subject: &Subject<'_>) -> Result<Vec<u64>> {
    let mut command = Command::new(tree.release().join("postern"));
    let done = output(command.arg("verify").arg(subject.host_file).arg("--json"))?;
    let report: Value = serde_json::from_slice(&done.stdout).with_context(|| {
        format!("postern verify: {}: {}", done.status, String::from_utf8_lossy(&done.stderr))
    })?;
    let ranges = report["damaged"].as_array().context("postern verify names no ranges")?;
    let mut blocks = Vec::new();
    for range in ranges {
        let offset = range["offset"].as_u64().context("a damaged range without offset")?;
        let length = range["length"].as_u64().context("a damaged range without length")?;
        blocks.extend((offset / BLOCK..(offset + length).div_ceil(BLOCK)).take(2));
    }
    Ok(blocks)
}

/// What dd says of reading one block of the guest's file directly.
fn read_with_dd(tree: &Tree, subject: &Subject<'_>, block: u64) -> Result<String> {
    let mut command = Command::new(tree.release().join("postern"));
    command
        .arg("run")
        .arg("--no-probes")
        .args(match fio::through(subject.guest_path, subject.host_file) {
            Way::Postern(arguments) => arguments,
            Way::Raw => Vec::new(),
        })
        .args(["--", "dd", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=noxfer"])
        .arg(format!("if={}", subject.guest_path))
        .arg(format!("skip={block}"))
        .env("LC_ALL", "C");
    let done = output(&mut command)?;
    let said = String::from_utf8_lossy(&done.stderr);
    let words = said.lines().filter(|line| !line.starts_with("postern: using")).collect::<Vec<_>>();
    Ok(words.join("; "))
}

/// fio reading the whole volume, going on after errors.
fn read_all(tree: &Tree, subject: &Subject<'_>) -> Result<fio::Outcome> {
    let arguments = [
        "--name=all",
        &format!("--filename={}", subject.guest_path),
        "--ioengine=libaio",
        "--direct=1",
        "--rw=read",
        "--bs=4k",
        "--iodepth=64",
        &format!("--size={}", subject.bytes),
        "--continue_on_error=io",
    ]
    .map(str::to_owned);
    let way = fio::through(subject.guest_path, subject.host_file);
    fio::measure(tree, &way, &arguments, subject.scratch)
}

/// Formats a volume at `host_file`.
///
/// # Errors
/// What `postern format` says.
pub fn format(tree: &Tree, host_file: &Path, size: &str) -> Result<()> {
    let mut command = Command::new(tree.release().join("postern"));
    let said = answer(command.arg("format").arg(host_file).args(["--size", size]))?;
    print!("{said}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A scratch file of this test, removed at its end.
    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn of(name: &str, content: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("xtask-{}-{name}", std::process::id()));
            std::fs::write(&path, content).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn a_pattern_is_found_once_wherever_it_lies() {
        let step = 4 << 20;
        for at in [0, 1, step - 16, step - 7, step, step + 8, step + 15, 2 * step + 3] {
            let mut content = vec![b'P'; 2 * step + 64];
            content[at..at + 16].copy_from_slice(PATTERN);
            let file = Scratch::of("search", &content);
            assert_eq!(occurrences(&file.0).unwrap(), (1, content.len() as u64), "{at}");
        }
    }

    #[test]
    fn flipping_twice_restores_the_file() {
        let file = Scratch::of("flip", &vec![0xa5; 3 * 4096]);
        let host = OpenOptions::new().read(true).write(true).open(&file.0).unwrap();
        flip(&host, 1).unwrap();
        let changed = std::fs::read(&file.0).unwrap();
        assert_eq!(changed.iter().filter(|&&byte| byte != 0xa5).count(), 1);
        assert_eq!(changed[4096 + 2048], 0x5a);
        flip(&host, 1).unwrap();
        assert!(std::fs::read(&file.0).unwrap().iter().all(|&byte| byte == 0xa5));
    }
}
