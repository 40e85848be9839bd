//! Daemons with probes that run as a user of their own.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::Child;

use posternd::engine::Interface;
use posternd::probes::{OBJECT_NAME, OBJECT_VARIABLE, Probes, ProbesUnavailable};

use crate::common::skip;

/// A user that owns nothing on any machine.
pub const NOBODY: u32 = 65534;
/// What the loader needs: capabilities(7).
pub const LOADERS: &str = "+bpf,+perfmon,+dac_read_search,+syslog";

/// A process that is killed at the latest when this is dropped.
pub struct Ended(pub Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The probes' object, where they can be loaded at all.
pub fn object() -> Option<PathBuf> {
    if !rustix::process::geteuid().is_root() || !Path::new("/usr/bin/setpriv").exists() {
        skip("needs root and setpriv(1)");
        return None;
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let named = std::env::var_os(OBJECT_VARIABLE).map(PathBuf::from);
    let places = ["", "debug", "release"].map(|sub| target.join(sub).join(OBJECT_NAME));
    let Some(object) = named.into_iter().chain(places).find(|path| path.is_file()) else {
        skip("no postern-probes.o; build it by `cargo xtask build`");
        return None;
    };
    match Probes::load(Some(&object), std::process::id(), Interface::Libaio) {
        Ok(_) => Some(object),
        Err(error @ ProbesUnavailable::Refused { .. }) => panic!("{error}"),
        Err(error) => {
            skip(&error.to_string());
            None
        }
    }
}

/// Puts the daemon, the object and files of 1 MiB that are called `volumes` into `directory`, all of
/// them nobody's.
pub fn parts_for_nobody(directory: &Path, object: &Path, volumes: &[&str]) {
    let path = |name: &str| directory.join(name);
    std::fs::copy(env!("CARGO_BIN_EXE_posternd"), path("posternd")).unwrap();
    std::fs::copy(object, path(OBJECT_NAME)).unwrap();
    for name in volumes {
        std::fs::write(path(name), vec![0; 1 << 20]).unwrap();
    }
    for name in ["", "posternd", OBJECT_NAME].iter().chain(volumes) {
        std::os::unix::fs::chown(path(name), Some(NOBODY), Some(NOBODY)).unwrap();
    }
}
