//! What a daemon that was taken over could still do. Each try is made by a thread that is confined
//! as the daemon is; the expected errors are those of landlock(7) and of the filter.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clap::Parser;
use common::{FakeLane, direct_io_works, directory, skip};
use posternd::confinement::confine;
use posternd::daemon::Options;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// Places on the host: what the operator allowed, and what not.
struct Places {
    directory: tempfile::TempDir,
}

impl Places {
    fn new() -> Option<Self> {
        // landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION).
        // SAFETY: no memory is passed.
        #[allow(unsafe_code)]
        let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
        if version < 3 {
            skip(&format!("this kernel's Landlock has version {version}, 3 is wanted"));
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        for name in ["root", "made", "run"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        for name in ["file", "root/inner", "other", "made/index"] {
            std::fs::write(directory.path().join(name), b"content").unwrap();
        }
        Some(Self { directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn options(&self) -> Options {
        let pair = |name: &str| format!("{name}={}", self.path(name).display());
        let socket = self.path("run/control").display().to_string();
        let (file, made) = (pair("file"), pair("made"));
        let root = self.path("root").display().to_string();
        let words = ["posternd", "--socket", &socket, "--file", &file, "--root", &root];
        Options::parse_from(words.into_iter().chain(["--directory", &made]))
    }

    /// What `body` answers on a confined thread.
    fn confined<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let options = self.options();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                confine(&options, posternd::engine::Interface::default());
                body()
            });
            thread.join().unwrap()
        })
    }
}

fn errno<T>(result: std::io::Result<T>) -> Errno {
    Errno::from_io_error(&result.err().expect("refused")).unwrap()
}

#[test]
fn only_what_the_operator_allowed_is_opened() {
    let Some(places) = Places::new() else { return };
    let paths = ["file", "root/inner", "made/index", "other", "root/new", "new"];
    let paths = paths.map(|name| places.path(name));
    let [file, inner, index, other, beneath, new] = &paths;
    places.confined(|| {
        for allowed in [file, inner, index] {
            let mut opened =
                std::fs::OpenOptions::new().read(true).write(true).open(allowed).unwrap();
            opened.write_all(b"changed").unwrap();
        }
        // What the probes cost, and how many processors wrote to their maps.
        for facts in ["/proc/self/fdinfo/0", "/sys/devices/system/cpu/possible"] {
            assert!(!std::fs::read(facts).unwrap().is_empty(), "{facts}");
        }
        for refused in [other.as_path(), Path::new("/etc/passwd"), Path::new("/proc/self/environ")]
        {
            assert_eq!(errno(std::fs::File::open(refused)), Errno::ACCESS, "{}", refused.display());
        }
        // Nothing is made where only opening was allowed, nothing is moved or linked anywhere.
        assert_eq!(errno(std::fs::File::create_new(beneath)), Errno::ACCESS);
        assert_eq!(errno(std::fs::File::create_new(new)), Errno::ACCESS);
        assert_eq!(errno(std::fs::rename(file, new)), Errno::PERM);
        assert_eq!(errno(std::fs::hard_link(file, new)), Errno::PERM);
        assert_eq!(errno(std::fs::remove_file(inner)), Errno::ACCESS);
    });
    let made = places.path("made/0123456789abcdef0123456789abcdef");
    places.confined(|| {
        std::fs::File::create_new(&made).unwrap().set_len(4096).unwrap();
        std::fs::remove_file(&made).unwrap();
    });
}

#[test]
fn no_program_no_process_no_connection_and_no_code_comes_into_being() {
    let Some(places) = Places::new() else { return };
    places.confined(|| {
        assert_eq!(errno(Command::new("/bin/true").status()), Errno::PERM);
        // SAFETY: if it does come into being, the child ends at once.
        #[allow(unsafe_code)]
        let child = unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(0);
            }
            child
        };
        assert_eq!(
            (child, errno(Err::<(), _>(std::io::Error::last_os_error()))),
            (-1, Errno::PERM)
        );
        assert_eq!(errno(TcpListener::bind("127.0.0.1:0")), Errno::PERM);
        assert_eq!(errno(UnixDatagram::unbound()), Errno::PERM);
        // SAFETY: new memory, used by nobody.
        #[allow(unsafe_code)]
        let map = |protection| unsafe {
            mmap_anonymous(core::ptr::null_mut(), 4096, protection, MapFlags::PRIVATE)
        };
        map(ProtFlags::READ | ProtFlags::WRITE).unwrap();
        assert_eq!(map(ProtFlags::READ | ProtFlags::EXEC).err(), Some(Errno::PERM));
        let me = rustix::process::getpid();
        let signal = rustix::process::Signal::CONT;
        assert_eq!(rustix::process::kill_process(me, signal), Err(Errno::PERM));
        // The probes' maps are read, not written: BPF_MAP_UPDATE_ELEM is number 2.
        // SAFETY: no memory is passed.
        #[allow(unsafe_code)]
        let written = unsafe { libc::syscall(libc::SYS_bpf, 2, 0, 16) };
        assert_eq!(written, -1);
        assert_eq!(errno(Err::<(), _>(std::io::Error::last_os_error())), Errno::PERM);
        // Threads go on to be made, and are confined too.
        let inner = std::thread::spawn(|| errno(std::fs::File::open("/etc/passwd")));
        assert_eq!(inner.join().unwrap(), Errno::ACCESS);
    });
}

#[test]
fn every_thread_of_a_serving_daemon_is_confined() {
    let directory = directory();
    if !direct_io_works(directory.path()) {
        return;
    }
    let file = directory.path().join("v");
    std::fs::write(&file, vec![0; 1 << 20]).unwrap();
    let socket = directory.path().join("control");
    let mut pair = std::ffi::OsString::from("v=");
    pair.push(&file);
    let mut daemon = Ended(
        Command::new(env!("CARGO_BIN_EXE_posternd"))
            .arg("--socket")
            .arg(&socket)
            .arg("--file")
            .arg(pair)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut ready = [0; 9];
    daemon.0.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    let mut lane = FakeLane::attach(&socket, 8, 1 << 20);
    lane.open("v");
    let tasks = format!("/proc/{}/task", daemon.0.id());
    let tasks: Vec<_> = std::fs::read_dir(tasks).unwrap().collect();
    assert!(tasks.len() >= 2, "the lane has a thread of its own");
    for task in tasks {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("{name} in {status}")).trim().to_owned()
        };
        assert_eq!(field("NoNewPrivs:"), "1");
        assert_eq!(field("Seccomp:"), "2", "a filter");
        for set in ["CapInh:", "CapPrm:", "CapEff:"] {
            // CAP_DAC_OVERRIDE is number 1.
            let held = u64::from_str_radix(&field(set), 16).unwrap();
            assert_eq!(held & !0b10, 0, "{set} {held:x}");
        }
    }
    lane.end();
}

/// Ends the daemon with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
