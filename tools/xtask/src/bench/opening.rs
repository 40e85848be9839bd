//! How long a volume takes to be made and opened, by its size.

use std::{path::Path, process::Command, time::Instant};

use anyhow::Result;

use super::numbers::median;
use crate::shell::{Tree, answer};

/// Sizes tried. The largest is sparse: nothing of it is written but its beginning.
const SIZES: [&str; 2] = ["1G", "4T"];
const ROUNDS: usize = 5;

/// Milliseconds, as a user waits for them: process start included.
pub struct Opening {
    /// Size of the volume, as `postern` takes it.
    pub size: &'static str,
    /// `postern format`.
    pub format_ms: f64,
    /// `postern info`: opens read-only.
    pub info_ms: f64,
    /// `postern run -- true`: opens read-only, starts and stops a daemon without probes.
    pub run_ms: f64,
}

/// Measures each size, the median of a few rounds.
///
/// # Errors
/// If a volume cannot be made there: ext4 wants room for none of it, but for its size.
pub fn measure(tree: &Tree, directory: &Path) -> Result<Vec<Opening>> {
    let postern = tree.release().join("postern");
    let key = directory.join("opening.key");
    std::fs::write(&key, [1; 32])?;
    let time = |command: &mut Command| -> Result<f64> {
        let started = Instant::now();
        answer(command.arg("--key-file").arg(&key))?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    };
    let mut all = Vec::new();
    for size in SIZES {
        let volume = directory.join("opening.vol");
        let (mut format, mut info, mut run) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            format.push(time(
                Command::new(&postern).arg("format").arg(&volume).args(["--size", size]),
            )?);
            info.push(time(Command::new(&postern).arg("info").arg(&volume))?);
            let mut shown = std::ffi::OsString::from("/sealed/opening=");
            shown.push(&volume);
            let started = Instant::now();
            answer(
                Command::new(&postern)
                    .args(["run", "--no-probes", "--key-file"])
                    .arg(&key)
                    .arg("--volume")
                    .arg(shown)
                    .args(["--", "true"]),
            )?;
            run.push(started.elapsed().as_secs_f64() * 1e3);
            std::fs::remove_file(&volume)?;
        }
        all.push(Opening {
            size,
            format_ms: median(&format),
            info_ms: median(&info),
            run_ms: median(&run),
        });
    }
    std::fs::remove_file(&key)?;
    Ok(all)
}
