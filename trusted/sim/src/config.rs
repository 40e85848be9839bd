//! What `postern run` tells the simulated enclave: the file named by `POSTERN_RUN`.

use postern_trusted::counter::Moves;
use serde::{Deserialize, Serialize};

/// Environment variable that names the run file.
pub const RUN_VARIABLE: &str = "POSTERN_RUN";
/// Most protected files and directories of a run.
pub const MOST_VOLUMES: usize = 256;

/// Content of the run file (JSON).
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct RunConfig {
    /// The daemon's control socket.
    pub socket: String,
    /// The protected files.
    pub volumes: Vec<VolumeConfig>,
    /// The protected directories.
    #[serde(default)]
    pub directories: Vec<DirectoryConfig>,
    /// Bytes of map nodes that all open volumes may keep in memory together.
    #[serde(default = "usual_cache")]
    pub cache_bytes: usize,
    /// The launcher's socket for monotonic counters, if a volume has one.
    #[serde(default)]
    pub counter_socket: String,
    /// How long open(2) waits for a volume that another program has, milliseconds.
    #[serde(default)]
    pub lease_wait_ms: u64,
    /// How long requests wait for another daemon when theirs has ended, milliseconds; then they
    /// fail with `EIO`.
    #[serde(default)]
    pub daemon_wait_ms: u64,
    /// The launcher whose daemon it is, as a process id: once that has gone no other daemon comes.
    #[serde(default)]
    pub launcher: Option<u32>,
}

/// Name of the run file, beside the socket of a run's own daemon. While it is there, a daemon that
/// has ended is started again.
pub const RUN_FILE: &str = "run.json";

/// 64 MiB.
const fn usual_cache() -> usize {
    64 << 20
}

/// The monotonic counter of a volume.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct CounterConfig {
    /// Its number at the launcher.
    pub index: u32,
    /// How often it moves.
    pub moves: MovesConfig,
}

/// How often a counter moves.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MovesConfig {
    /// At each opening and clean close.
    Open,
    /// At each checkpoint too.
    Checkpoint,
    /// Before each sync returns too.
    Sync,
}

impl From<MovesConfig> for Moves {
    fn from(moves: MovesConfig) -> Self {
        match moves {
            MovesConfig::Open => Self::Open,
            MovesConfig::Checkpoint => Self::Checkpoint,
            MovesConfig::Sync => Self::Sync,
        }
    }
}

impl From<Moves> for MovesConfig {
    fn from(moves: Moves) -> Self {
        match moves {
            Moves::Open => Self::Open,
            Moves::Checkpoint => Self::Checkpoint,
            Moves::Sync => Self::Sync,
        }
    }
}

/// One protected directory.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct DirectoryConfig {
    /// Absolute path under which the guest sees the directory, without a slash at the end.
    pub guest_path: String,
    /// Name of the directory at the daemon.
    pub name: String,
    /// File that holds the key; empty if [`Self::key_memory`] has it.
    pub key_file: String,
    /// Name of a memory file, inherited by the first program of the run, that holds what a
    /// passphrase was stretched to.
    #[serde(default)]
    pub key_memory: Option<String>,
    /// Most bytes that a file made in it can have; a multiple of 4096.
    pub file_capacity: u64,
    /// Its files give space that becomes free back to the host.
    #[serde(default)]
    pub discard: bool,
    /// The monotonic counter of its index.
    #[serde(default)]
    pub counter: Option<CounterConfig>,
}

/// One protected file.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct VolumeConfig {
    /// Absolute path under which the guest sees the volume.
    pub guest_path: String,
    /// Name of the host file at the daemon.
    pub name: String,
    /// File that holds the key; empty if [`Self::key_memory`] has it.
    pub key_file: String,
    /// Name of a memory file, inherited by the first program of the run, that holds what a
    /// passphrase was stretched to.
    #[serde(default)]
    pub key_memory: Option<String>,
    /// It gives space that becomes free back to the host.
    #[serde(default)]
    pub discard: bool,
    /// Its monotonic counter.
    #[serde(default)]
    pub counter: Option<CounterConfig>,
    /// It is only read, with other programs that read it.
    #[serde(default)]
    pub read_only: bool,
    /// It is not handed over to other programs that ask for it.
    #[serde(default)]
    pub exclusive: bool,
}

/// Why a key file cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadKey {
    /// Length of what was found, in bytes.
    pub length: usize,
}

impl core::fmt::Display for BadKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "a key is 32 bytes, or 64 hexadecimal digits; this file has {} bytes",
            self.length
        )
    }
}

/// Decodes the content of a key file: 32 raw bytes, or 64 hexadecimal digits and at most one
/// newline.
///
/// # Errors
/// [`BadKey`] for anything else.
pub fn parse_key(content: &[u8]) -> Result<[u8; 32], BadKey> {
    let bad = BadKey { length: content.len() };
    if let Ok(raw) = <[u8; 32]>::try_from(content) {
        return Ok(raw);
    }
    let digits = content.strip_suffix(b"\n").unwrap_or(content);
    if digits.len() != 64 {
        return Err(bad);
    }
    let mut key = [0; 32];
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16);
        let (Some(high), Some(low)) = (digit(pair[0]), digit(pair[1])) else { return Err(bad) };
        *byte = u8::try_from(high * 16 + low).map_err(|_| bad)?;
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_32_raw_bytes_or_64_hexadecimal_digits_and_nothing_else() {
        assert_eq!(parse_key(&[7; 32]), Ok([7; 32]));
        assert_eq!(parse_key(&[b'a'; 64]), Ok([0xaa; 32]));
        let mut line = [b'0'; 65];
        line[64] = b'\n';
        assert_eq!(parse_key(&line), Ok([0; 32]));
        for length in [0, 31, 33, 63, 65, 66, 4096] {
            assert_eq!(parse_key(&vec![b'0'; length]), Err(BadKey { length }));
        }
        assert_eq!(parse_key(&[b'g'; 64]), Err(BadKey { length: 64 }));
    }
}
