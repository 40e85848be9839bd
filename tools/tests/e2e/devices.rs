//! Loop devices and file systems of a test's own, taken down when it ends. Root only.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use crate::common::{Ended, end, is_root, on_path, skip};

fn run<A: AsRef<OsStr>>(program: &str, words: impl IntoIterator<Item = A>) -> Ended {
    end(Command::new(program).args(words))
}

/// Whether this machine lets a test have what is in here; says loudly what it lacks.
pub fn are_possible(programs: &[&str]) -> bool {
    if !is_root() {
        skip("loop devices and mounts need root");
        return false;
    }
    for program in ["losetup", "mount", "umount"].iter().chain(programs) {
        if !on_path(program) && !Path::new("/usr/sbin").join(program).is_file() {
            skip(&format!("{program} is not installed"));
            return false;
        }
    }
    true
}

/// A loop device.
pub struct Loop(PathBuf);

impl Loop {
    /// One over a new file of `size` at `path`; `direct` has it go past the page cache. `None` (said
    /// loudly) where there are none.
    pub fn over(path: &Path, size: &str, direct: bool) -> Option<Self> {
        run("truncate", [OsStr::new("-s"), size.as_ref(), path.as_os_str()]).expect(0);
        let direct = if direct { "--direct-io=on" } else { "--direct-io=off" };
        let options = ["--find", "--show", direct].map(OsStr::new);
        let made = run("losetup", options.into_iter().chain([path.as_os_str()]));
        if made.code() != 0 {
            skip(&format!("no loop device: {}", made.stderr.trim()));
            return None;
        }
        Some(Self(PathBuf::from(made.stdout.trim())))
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Sets a property of its queue.
    pub fn set(&self, property: &str, value: &str) {
        let name = self.0.file_name().unwrap();
        let place = Path::new("/sys/block").join(name).join("queue").join(property);
        std::fs::write(&place, value).unwrap_or_else(|e| panic!("{}: {e}", place.display()));
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
        // The kernel lets the file go when the last has closed the device, a moment later at times.
        let name = self.0.file_name().unwrap();
        let file = Path::new("/sys/block").join(name).join("loop/backing_file");
        patiently(|| !file.exists());
    }
}

/// A process whose requests to a device the kernel can hold back, so that the device is slow and its
/// queue is not: what is submitted is accepted at once. The limit goes when it is dropped.
pub struct Throttled {
    /// The control group that the process is in.
    group: PathBuf,
    /// Version 2 of control groups.
    unified: bool,
    device: String,
}

impl Throttled {
    /// Makes `pid` such a process, for `device`. `None` (said loudly) where the kernel has no control of
    /// I/O that this test may have.
    pub fn new(device: &Loop, pid: u32) -> Option<Self> {
        let made = Self::group(device, pid);
        if made.is_none() {
            skip("no control group for block devices");
        }
        made
    }

    fn group(device: &Loop, pid: u32) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
        let mut mounts = mounts.lines().filter_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let (place, kind) = (PathBuf::from(words.get(1)?), *words.get(2)?);
            let controls = std::fs::read_to_string(place.join("cgroup.controllers"));
            let has_io = controls.is_ok_and(|all| all.split_whitespace().any(|one| one == "io"));
            match kind {
                "cgroup" if words.get(3)?.split(',').any(|word| word == "blkio") => {
                    Some((place, false))
                }
                "cgroup2" if has_io => Some((place, true)),
                _ => None,
            }
        });
        let (root, unified) = mounts.next()?;
        if unified {
            std::fs::write(root.join("cgroup.subtree_control"), "+io").ok()?;
        }
        let name = device.0.file_name()?;
        let device =
            std::fs::read_to_string(Path::new("/sys/block").join(name).join("dev")).ok()?;
        let group = root.join(format!("postern-test-{pid}"));
        std::fs::create_dir(&group).ok()?;
        let made = Self { group, unified, device: device.trim().to_owned() };
        let control = if unified { "io.max" } else { "blkio.throttle.write_iops_device" };
        std::fs::write(made.group.join("cgroup.procs"), pid.to_string()).ok()?;
        made.group.join(control).exists().then_some(made)
    }

    /// Lets so many requests through in a second, of reads and of writes; `None`: all.
    #[track_caller]
    pub fn limit(&self, per_second: Option<u32>) {
        let Self { group, unified, device } = self;
        if *unified {
            let most = per_second.map_or_else(|| "max".to_owned(), |most| most.to_string());
            let line = format!("{device} riops={most} wiops={most}");
            std::fs::write(group.join("io.max"), line).unwrap();
            return;
        }
        for what in ["read", "write"] {
            let line = format!("{device} {}", per_second.unwrap_or(0));
            std::fs::write(group.join(format!("blkio.throttle.{what}_iops_device")), line).unwrap();
        }
    }
}

impl Drop for Throttled {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.limit(None);
        }
        // A process can not be in a group that goes.
        let root = self.group.parent().unwrap_or(Path::new("/")).join("cgroup.procs");
        for pid in
            std::fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default().lines()
        {
            let _ = std::fs::write(&root, pid);
        }
        patiently(|| std::fs::remove_dir(&self.group).is_ok());
    }
}

/// Tries until it works, or for half a minute. A test that has ended can not fail any more.
fn patiently(mut works: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    loop {
        if works() {
            return true;
        }
        if started.elapsed() > Duration::from_secs(30) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A mounted file system; unmounted when dropped.
pub struct Mounted(PathBuf);

impl Mounted {
    /// A new file system of the kind `kind`, mounted at the directory `at`, which is made; with no
    /// device it is one in memory. `None` (said loudly) where this machine has no such kind.
    pub fn new(kind: &str, device: Option<&Path>, at: &Path) -> Option<Self> {
        std::fs::create_dir(at).unwrap();
        if let Some(device) = device {
            let force = if kind == "ext4" { "-F" } else { "-f" };
            let made = run(
                &format!("mkfs.{kind}"),
                [OsStr::new("-q"), force.as_ref(), device.as_os_str()],
            );
            if made.code() != 0 {
                skip(&format!("mkfs.{kind} does not work here: {}", made.stderr.trim()));
                return None;
            }
        }
        let source = device.unwrap_or(Path::new("none"));
        let mounted =
            run("mount", [OsStr::new("-t"), kind.as_ref(), source.as_os_str(), at.as_os_str()]);
        if mounted.code() != 0 {
            skip(&format!("{kind} can not be mounted here: {}", mounted.stderr.trim()));
            return None;
        }
        Some(Self(at.to_owned()))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Holds all writes to it until what is answered is dropped.
    #[track_caller]
    pub fn freeze(&self) -> Frozen {
        run("fsfreeze", [OsStr::new("-f"), self.0.as_os_str()]).expect(0);
        Frozen(self.0.clone())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = || run("umount", [self.0.as_os_str()]).code() == 0;
        if !patiently(unmounted) {
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        }
    }
}

/// A file system that does no writes.
pub struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.0).status();
    }
}
