//! Where the other parts of Postern lie.

use std::path::{Path, PathBuf};

use crate::error::{Exit, Failure};

/// A part that `postern run` needs.
pub struct Part {
    /// File name.
    name: &'static str,
    /// Environment variable that names another file.
    variable: &'static str,
}

/// The daemon.
pub const DAEMON: Part = Part { name: "posternd", variable: "POSTERN_DAEMON" };
/// The library that puts a program on top of the trusted side.
pub const PRELOAD: Part = Part { name: "libpostern_preload.so", variable: "POSTERN_PRELOAD" };

impl Part {
    /// Finds the file: the environment's, else beside this executable, else in `../lib/postern`.
    ///
    /// # Errors
    /// [`Exit::Internal`] if it is nowhere.
    pub fn find(&self) -> Result<PathBuf, Failure> {
        let missing = |place: &Path, advice: String| {
            Failure::new(
                Exit::Internal,
                format!("{} is missing", self.name),
                place.display(),
                advice,
            )
        };
        if let Some(given) = std::env::var_os(self.variable) {
            let path = PathBuf::from(given);
            return match path.canonicalize() {
                Ok(path) if path.is_file() => Ok(path),
                _ => Err(missing(&path, format!("correct or unset {}", self.variable))),
            };
        }
        let executable = std::env::current_exe().map_err(|error| {
            Failure::io("cannot find this executable", "/proc/self/exe", &error)
        })?;
        let beside = executable.parent().unwrap_or(Path::new("/"));
        [beside.join(self.name), beside.join("../lib/postern").join(self.name)]
            .into_iter()
            .find(|path| path.is_file())
            .ok_or_else(|| {
                missing(beside, format!("build it (`cargo xtask build`), or set {}", self.variable))
            })
    }
}
