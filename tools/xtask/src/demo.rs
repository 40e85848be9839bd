//! `cargo xtask demo`: fio, unmodified, on a sealed volume; what it costs; what the host sees.

use std::{path::Path, time::Instant};

use anyhow::{Context as _, Result};

use crate::{
    build,
    fio::{self, Way},
    proofs::{self, Subject},
    setup,
    shell::{Tree, elapsed, line_of, run, show},
    stages,
};

const GUEST_PATH: &str = "/sealed/data";
const SIZE: &str = "1g";
const SIZE_BYTES: u64 = 1 << 30;

/// Shows the way of a request from end to end, and proves what the host cannot do.
///
/// # Errors
/// If a station does not hold what it promises.
pub fn all(tree: &Tree) -> Result<()> {
    setup::all(tree)?;
    build::all(tree)?;
    fio::need()?;
    let started = Instant::now();
    let scratch = tree.fresh_directory("demo")?;
    let host_file = scratch.join("data.vol");

    title("a volume of 1 GiB");
    proofs::format(tree, &host_file, SIZE)?;

    title("fio through the postern: libaio, direct, random reads and writes, verified");
    let statistics = scratch.join("stages.json");
    let Way::Postern(mut before) = fio::through(GUEST_PATH, &host_file) else { return Ok(()) };
    before.extend(["--stats".into(), statistics.clone().into_os_string()]);
    play(tree, &Way::Postern(before), &job(&[]))?;

    title("latency per stage of those requests");
    stages::print(&statistics)?;

    title("a second process opens the volume again and verifies everything");
    play(tree, &fio::through(GUEST_PATH, &host_file), &job(&["--verify_only"]))?;

    let subject = Subject {
        guest_path: GUEST_PATH,
        host_file: &host_file,
        bytes: SIZE_BYTES,
        scratch: &scratch,
    };
    title("sealing: the host file holds no plaintext");
    proofs::sealing(tree, &subject)?;

    title("integrity: an altered block gives EIO, the others still read");
    proofs::integrity(tree, &subject)?;

    println!("\ndemo: {} in all, files in {}", elapsed(started.elapsed()), show(&scratch));
    Ok(())
}

fn job(more: &[&str]) -> Vec<String> {
    let filename = format!("--filename={GUEST_PATH}");
    let size = format!("--size={SIZE}");
    let fixed = [
        "--name=demo",
        &filename,
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randrw",
        "--bs=4k",
        "--iodepth=32",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_state_save=0",
        "--eta=never",
        &size,
    ];
    fixed.iter().chain(more).map(|word| (*word).to_owned()).collect()
}

/// Runs fio so that one sees the command and fio's own summary.
fn play(tree: &Tree, way: &Way, arguments: &[String]) -> Result<()> {
    let mut command = fio::command(tree, way, arguments);
    println!(
        "$ {}",
        line_of(&command).replace(&tree.release().display().to_string(), &parts(tree))
    );
    run(&mut command).context("fio failed or found wrong data")
}

fn parts(tree: &Tree) -> String {
    let release = tree.release();
    show(release.strip_prefix(&tree.root).map_or(release.as_path(), Path::new))
}

fn title(text: &str) {
    println!("\n== {text}\n");
}
