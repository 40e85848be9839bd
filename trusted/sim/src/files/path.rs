//! Guest paths made comparable: absolute, without `.`, `..` and doubled slashes.
//!
//! Lexical: symbolic links are not followed, so a protected file is reached by its own name, not
//! through a link to it.

use crate::guest::PATH_ROOM;

/// A normalised path in a fixed buffer (no allocation on the way of ordinary calls).
pub struct Normal {
    bytes: [u8; PATH_ROOM],
    length: usize,
    /// The path ended in `/`, `/.` or `/..`: it can only name a directory.
    pub directory: bool,
}

impl Normal {
    /// Normalises `path`, read from `base` (an absolute directory) if it is relative. `None` for
    /// an empty path or one that is too long to be compared.
    #[must_use]
    pub fn new(base: &[u8], path: &[u8]) -> Option<Self> {
        if path.is_empty() {
            return None;
        }
        let mut made = Self { bytes: [0; _], length: 0, directory: false };
        if path[0] != b'/' {
            if base.first() != Some(&b'/') {
                return None;
            }
            made.append(base)?;
        }
        made.append(path)?;
        let last = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
        made.directory = matches!(last, b"" | b"." | b"..");
        Some(made)
    }

    fn append(&mut self, path: &[u8]) -> Option<()> {
        for part in path.split(|&byte| byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => {
                    let parent = self.as_bytes().iter().rposition(|&byte| byte == b'/');
                    self.length = parent.unwrap_or(0);
                }
                name => {
                    let end = self.length + 1 + name.len();
                    let room = self.bytes.get_mut(self.length..end)?;
                    room[0] = b'/';
                    room[1..].copy_from_slice(name);
                    self.length = end;
                }
            }
        }
        Some(())
    }

    /// The path. The root directory is the empty path.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// A path that goes through a protected directory and out of it again, from where it comes out: the
/// kernel knows nothing of that directory. What follows outside is left as it is. `None` for a path
/// that does not come out of one. `base` is where a relative `path` counts from; `is_root` knows
/// the protected directories by their paths.
#[must_use]
pub fn outward(base: &[u8], path: &[u8], is_root: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    let mut at = Normal { bytes: [0; PATH_ROOM], length: 0, directory: true };
    if path.first() != Some(&b'/') {
        at.append(base)?;
    }
    let (mut rest, mut found) = (path, None);
    while !rest.is_empty() {
        let end = rest.iter().position(|&byte| byte == b'/').unwrap_or(rest.len());
        let (part, after) = rest.split_at(end);
        rest = after.strip_prefix(b"/").unwrap_or(after);
        let leaves = part == b".." && is_root(at.as_bytes());
        at.append(part)?;
        if leaves {
            found = Some([at.as_bytes(), b"/", rest].concat());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(base: &str, path: &str) -> Option<(String, bool)> {
        Normal::new(base.as_bytes(), path.as_bytes())
            .map(|n| (String::from_utf8_lossy(n.as_bytes()).into_owned(), n.directory))
    }

    #[test]
    fn spellings_of_one_path_are_one_path() {
        let vault = Some(("/vault/db".to_owned(), false));
        for path in ["/vault/db", "//vault///db", "/./vault/./db", "/x/../vault/y/z/../../db"] {
            assert_eq!(normal("/nowhere", path), vault, "{path}");
        }
        assert_eq!(normal("/vault", "db"), vault);
        assert_eq!(normal("/vault/deep/", "../db"), vault);
        assert_eq!(normal("/", "../../vault/db"), vault);
        assert_eq!(normal("/vault", "./db/"), Some(("/vault/db".to_owned(), true)));
        assert_eq!(normal("/vault", "/vault/db/."), Some(("/vault/db".to_owned(), true)));
        assert_eq!(normal("/vault", ".."), Some((String::new(), true)));
    }

    #[test]
    fn paths_that_name_nothing_are_not_compared() {
        assert_eq!(normal("/vault", ""), None);
        assert_eq!(normal("(unreachable)/vault", "db"), None);
        assert_eq!(normal("/", &"x/".repeat(513)), None);
        assert!(normal("/", &"/x".repeat(512)).is_some());
    }

    #[test]
    fn a_path_out_of_a_protected_directory_goes_on_outside_as_it_is() {
        let lead = |base: &str, path: &str| {
            outward(base.as_bytes(), path.as_bytes(), |at| at == b"/srv/vault")
                .map(|path| String::from_utf8_lossy(&path).into_owned())
        };
        let to = |path: &str| Some(path.to_owned());
        assert_eq!(lead("/srv/vault", ".."), to("/srv/"));
        assert_eq!(lead("/srv/vault", "../etc"), to("/srv/etc"));
        assert_eq!(lead("/srv/vault/a/b", "../.././../../etc//x/"), to("/srv/../etc//x/"));
        assert_eq!(lead("/srv/vault/a", "b/../..//../link/../x"), to("/srv/link/../x"));
        assert_eq!(lead("/nowhere", "/srv//vault/../x"), to("/srv/x"));
        assert_eq!(lead("/srv", "vault/a/../../x"), to("/srv/x"));
        for path in ["../x", "x/../..", "/etc", "/etc/../srv/vault/a", ""] {
            assert_eq!(lead("/srv/vault/a", path), None, "{path}");
        }
        let at_root = |path: &[u8]| outward(b"/vault", path, |at| at == b"/vault");
        assert_eq!(at_root(b"../x"), Some(b"/x".to_vec()));
    }
}
