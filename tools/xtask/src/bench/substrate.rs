//! What the files lie on.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::shell::{Tree, answer};

/// What the files lie on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// The directory's own file system
    #[default]
    Directory,
    /// ext4 on a loop device over tmpfs (root)
    Loop,
    /// ext4 on zram: a device without limits (root)
    Zram,
}

/// A place for the files; taken down when dropped.
pub struct Substrate {
    /// Where they lie.
    pub directory: PathBuf,
    device: Option<PathBuf>,
    kind: Kind,
}

impl Substrate {
    /// Makes one of `kind` with room for `megabytes`, below `directory`.
    ///
    /// # Errors
    /// If it takes root, or the kernel has none.
    pub fn new(tree: &Tree, kind: Kind, directory: Option<&Path>, megabytes: u64) -> Result<Self> {
        let directory = match directory {
            Some(directory) => directory.to_owned(),
            None => tree.fresh_directory("bench")?,
        };
        let mut made = Self { directory, device: None, kind };
        let device = match kind {
            Kind::Directory => return Ok(made),
            Kind::Loop => {
                let backing =
                    PathBuf::from(format!("/dev/shm/postern-bench-{}", std::process::id()));
                std::fs::File::create(&backing)?.set_len(megabytes << 20)?;
                let device =
                    answer(Command::new("losetup").args(["--find", "--show"]).arg(&backing));
                // The device keeps it.
                std::fs::remove_file(&backing)?;
                PathBuf::from(device?.trim())
            }
            Kind::Zram => {
                let number = std::fs::read_to_string("/sys/class/zram-control/hot_add")
                    .context("no zram device can be added: be root, load zram")?;
                let name = format!("zram{}", number.trim());
                std::fs::write(format!("/sys/block/{name}/disksize"), format!("{megabytes}M"))?;
                PathBuf::from("/dev").join(name)
            }
        };
        made.device = Some(device.clone());
        answer(Command::new("mkfs.ext4").arg("-q").arg(&device))?;
        let mount = made.directory.join("mount");
        std::fs::create_dir_all(&mount)?;
        answer(Command::new("mount").arg(&device).arg(&mount))?;
        made.directory = mount;
        Ok(made)
    }
}

impl Drop for Substrate {
    fn drop(&mut self) {
        let Some(device) = &self.device else { return };
        let _ = Command::new("umount").arg(&self.directory).status();
        let done = match self.kind {
            Kind::Zram => device
                .to_str()
                .and_then(|name| name.strip_prefix("/dev/zram"))
                .map(|number| std::fs::write("/sys/class/zram-control/hot_remove", number)),
            _ => Command::new("losetup").arg("-d").arg(device).status().map(drop).into(),
        };
        if let Some(Err(error)) = done {
            eprintln!("    {} stays: {error}", device.display());
        }
    }
}

/// Megabytes that fio's `size` means.
///
/// # Errors
/// If it is no number with k, m, g or nothing.
pub fn megabytes(size: &str) -> Result<u64> {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().with_context(|| format!("`{size}` is no size"))?;
    Ok(match size[digits.len()..].to_ascii_lowercase().as_str() {
        "" => number >> 20,
        "k" => number >> 10,
        "m" => number,
        "g" => number << 10,
        _ => bail!("`{size}` is no size: write 512m or 1g"),
    })
}
