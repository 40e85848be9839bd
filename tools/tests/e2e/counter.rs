//! Monotonic counters: a host that puts older states back, and a counter that is not there.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::common::{Ended, World, begin, children, end, name_of, on_path, signal, skip, until};

const USAGE: i32 = 64;
const NO_COUNTER: i32 = 75;
const ROLLED_BACK: i32 = 76;

/// A counter and how it is reached.
struct Counted<'a> {
    world: &'a World,
    options: Vec<OsString>,
}

impl<'a> Counted<'a> {
    fn new(world: &'a World, counter: impl Into<OsString>) -> Self {
        Self { world, options: vec!["--counter".into(), counter.into()] }
    }

    fn postern(&self, words: &[&str]) -> Command {
        let mut command = self.world.postern(words);
        command.args(&self.options);
        command
    }

    /// Writes `text` to the start of the volume and syncs it, the counter moving at each sync.
    fn write(&self, volume: &Path, text: &str) -> Ended {
        end(&mut self.run(volume, &format!("printf {text} | {}", dd("of", "conv=fsync,notrunc"))))
    }

    fn run(&self, volume: &Path, line: &str) -> Command {
        let mut shown = OsString::from("/sealed/data=");
        shown.push(volume);
        let mut command = self.world.postern(["run", "--no-probes", "--counter-moves", "sync"]);
        command.arg("--volume").arg(shown).args(&self.options);
        command.args(["--", "sh", "-c", line]);
        command
    }

    fn format(&self) -> PathBuf {
        end(&mut self.postern(&["format", "v", "--size", "4M"])).expect(0);
        self.world.path("v")
    }
}

fn dd(what: &str, how: &str) -> String {
    format!("dd {what}=/sealed/data {how} status=none")
}

/// What `rollback` stands on: whichever counter it is.
fn old_states_are_refused_until_one_is_accepted_on_purpose(counted: &Counted<'_>) {
    let volume = counted.format();
    counted.write(&volume, "one").expect(0);
    let old = fs::read(&volume).unwrap();
    counted.write(&volume, "two").expect(0);
    let new = fs::read(&volume).unwrap();
    let info = end(&mut counted.postern(&["info", "v"])).expect(0);
    assert!(info.stdout.contains("newest"), "{}", info.stdout);

    fs::write(&volume, &old).unwrap();
    let refused = counted.write(&volume, "three").expect(ROLLED_BACK);
    let line = refused.stderr.lines().last().unwrap_or_default();
    assert!(line.contains("not the newest state") && line.contains("counter reset"), "{line}");
    end(&mut counted.postern(&["verify", "v"])).expect(65);
    assert!(fs::read(&volume).unwrap() == old, "a refused volume was written");

    fs::write(&volume, &new).unwrap();
    let read = end(&mut counted.run(&volume, &dd("if", "bs=3 count=1"))).expect(0);
    assert_eq!(read.stdout, "two");

    fs::write(&volume, &old).unwrap();
    end(&mut counted.postern(&["counter", "reset", "v"])).expect(0);
    let read = end(&mut counted.run(&volume, &dd("if", "bs=3 count=1"))).expect(0);
    assert_eq!(read.stdout, "one");
    fs::write(&volume, &new).unwrap();
    counted.write(&volume, "four").expect(ROLLED_BACK);

    // Without its counter a bound volume is not written.
    let plain = Counted { world: counted.world, options: Vec::new() };
    plain.write(&volume, "five").expect(USAGE);
    let mut free = plain.postern(&["counter", "reset", "v", "--none"]);
    end(&mut free).expect(0);
    plain.write(&volume, "six").expect(0);
    counted.write(&volume, "seven").expect(ROLLED_BACK);
}

#[test]
fn a_whole_disk_rollback_is_refused_with_a_counter_in_a_file() {
    let Some(world) = World::new() else { return };
    let counted = Counted::new(&world, "file:c");
    old_states_are_refused_until_one_is_accepted_on_purpose(&counted);
    let shown = end(&mut world.postern(["counter", "show", "file:c"])).expect(0);
    assert!(shown.stdout.starts_with("postern1 "), "{}", shown.stdout);
    assert!(shown.stderr.contains("protects against no host"), "{}", shown.stderr);
    end(&mut counted.postern(&["format", "w", "--size", "4M"])).expect(USAGE);
    assert!(!world.path("w").exists(), "a volume whose counter is another's was left behind");
}

/// A line of the shell with a protected directory that has a counter.
fn in_directory(world: &World, moves: &str, line: &str) -> Command {
    let words = ["run", "--no-probes", "--create", "1M", "--counter", "file:c"];
    let mut command = world.postern(words);
    let mut shown = OsString::from("/data/=");
    shown.push(world.path("d"));
    command.args(["--counter-moves", moves, "--volume"]).arg(shown);
    command.args(["--", "sh", "-c", line]);
    command
}

/// Runs the line, and kills its shell at the end, with all that it has open.
fn killed_in_directory(world: &World, moves: &str, line: &str) {
    let mut running = begin(&mut in_directory(world, moves, &format!("{line}; exec sleep 1000")));
    let guest = until("the end of the line", || {
        assert!(running.is_running(), "the guest ended by itself");
        children(running.pid()).into_iter().find(|&pid| name_of(pid) == "sleep")
    });
    signal("KILL", guest);
    running.wait().expect(137);
}

/// The file is new, never closed, and its state is copied aside by the host after each sync.
#[test]
fn an_open_file_of_a_directory_is_never_older_than_its_last_sync_where_the_counter_moves_then() {
    let Some(world) = World::new() else { return };
    let put = |text: &str| {
        format!(
            "printf {text} | dd of=/data/f conv=fsync,notrunc status=none && \
             for file in d/????????????????????????????????; do cp --sparse=always $file {text}; done"
        )
    };
    let line = format!("exec 3<>/data/f; {} && {} && {}", put("one"), put("two"), put("three"));
    killed_in_directory(&world, "sync", &line);
    let mut files = fs::read_dir(world.path("d")).unwrap().map(|entry| entry.unwrap().path());
    let file = files.find(|path| !path.ends_with("index")).unwrap();
    let read = || end(&mut in_directory(&world, "sync", "cat /data/f"));
    let show = |state: &str| {
        end(world.command("cp").args(["--sparse=always", state]).arg(&file)).expect(0);
        read()
    };
    for state in ["one", "two"] {
        let ended = show(state);
        assert_ne!(ended.code(), 0, "{state}: {}", ended.stdout);
        assert!(ended.stderr.contains("the directory's index records"), "{}", ended.stderr);
    }
    assert_eq!(show("three").expect(0).stdout, "three");
    // In the sessions to come, too.
    killed_in_directory(&world, "sync", &format!("exec 3<>/data/f; {}", put("four.")));
    assert_eq!(read().expect(0).stdout, "four.");
    assert_ne!(show("three").code(), 0);
}

#[test]
fn what_a_kill_left_without_a_name_goes_also_after_the_counter_was_reset() {
    let Some(world) = World::new() else { return };
    // Open when it is killed: else the index has been closed before.
    killed_in_directory(&world, "checkpoint", "exec 3<>/data/f; echo one >&3; sync /data/f");
    let stray = world.path("d").join("0123456789abcdef0123456789abcdef");
    fs::write(&stray, "a volume that was just being made").unwrap();
    end(&mut world.postern(["counter", "reset", "d", "--counter", "file:c"])).expect(0);
    let read = end(&mut in_directory(&world, "checkpoint", "cat /data/f")).expect(0);
    assert_eq!(read.stdout, "one\n");
    assert!(!stray.exists(), "a host file without a name stayed");
}

#[test]
fn an_older_name_table_of_a_protected_directory_is_refused_with_a_counter() {
    let Some(world) = World::new() else { return };
    let run = |line: &str| end(&mut in_directory(&world, "checkpoint", line));
    run("echo one > /data/one").expect(0);
    let old = fs::read(world.path("d/index")).unwrap();
    // Removing a name and going back would bring the file's name back.
    run("rm /data/one").expect(0);
    let new = fs::read(world.path("d/index")).unwrap();
    fs::write(world.path("d/index"), old).unwrap();
    run("ls /data").expect(ROLLED_BACK);
    fs::write(world.path("d/index"), new).unwrap();
    assert_eq!(run("ls /data").expect(0).stdout, "");
}

/// etcd, ended when dropped.
struct Etcd {
    child: Child,
    url: String,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Etcd {
    /// `None` (said loudly) where etcd is not installed.
    fn start(world: &World, tls: Option<&Path>) -> Option<Self> {
        if !on_path("etcd") {
            skip("etcd is not installed (Debian: etcd-server)");
            return None;
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://127.0.0.1:{}", free_port());
        let peer = format!("http://127.0.0.1:{}", free_port());
        Some(Self { child: Self::spawn(world, &url, &peer, tls), url })
    }

    fn spawn(world: &World, url: &str, peer: &str, tls: Option<&Path>) -> Child {
        let mut command = Command::new("etcd");
        command.args(["--name", "t", "--data-dir", "etcd", "--log-level", "error"]);
        for (name, value) in [
            ("listen-client-urls", url),
            ("advertise-client-urls", url),
            ("listen-peer-urls", peer),
            ("initial-advertise-peer-urls", peer),
        ] {
            command.arg(format!("--{name}")).arg(value);
        }
        command.arg("--initial-cluster").arg(format!("t={peer}"));
        if let Some(certificate) = tls {
            command.arg("--cert-file").arg(certificate.with_extension("crt"));
            command.arg("--key-file").arg(certificate.with_extension("key"));
        }
        command.current_dir(world.directory()).env("ETCD_UNSUPPORTED_ARCH", "");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    }

    fn counter(&self, key: &str) -> OsString {
        format!("etcd:{}/{key}", self.url).into()
    }

    /// Waits until it answers.
    fn ready(&mut self, counted: &Counted<'_>) {
        until("etcd answers", || {
            assert!(self.child.try_wait().unwrap().is_none(), "etcd ended");
            let mut show = counted.world.postern(["counter", "show"]);
            show.args(&counted.options[1..]);
            (end(&mut show).code() == 0).then_some(())
        });
    }
}

#[test]
fn a_whole_disk_rollback_is_refused_with_a_counter_in_etcd() {
    let Some(world) = World::new() else { return };
    let Some(mut etcd) = Etcd::start(&world, None) else { return };
    let counted = Counted::new(&world, etcd.counter("postern/data"));
    etcd.ready(&counted);
    old_states_are_refused_until_one_is_accepted_on_purpose(&counted);
}

#[test]
fn a_sync_fails_with_eio_while_etcd_is_gone_and_what_it_wrote_is_there_when_it_is_back() {
    let Some(world) = World::new() else { return };
    let Some(mut etcd) = Etcd::start(&world, None) else { return };
    let counted = Counted::new(&world, etcd.counter("k"));
    etcd.ready(&counted);
    let volume = counted.format();
    // The guest opens the volume, waits until etcd is gone, and syncs.
    let line = format!(
        "exec 3<>/sealed/data; printf old >&3; sync /sealed/data && touch began; \
         while [ ! -e gone ]; do sleep 0.05; done; {}; exec 3>&-",
        format_args!("printf new | {}", dd("of", "conv=fsync,notrunc"))
    );
    let running = begin(&mut counted.run(&volume, &line));
    until("the guest began", || world.path("began").exists().then_some(()));
    etcd.child.kill().unwrap();
    etcd.child.wait().unwrap();
    fs::write(world.path("gone"), "").unwrap();
    let ended = running.wait();
    assert!(ended.stderr.contains("Input/output error"), "{}", ended.stderr);
    assert!(ended.stderr.contains("counter gives no answer"), "{}", ended.stderr);
    counted.write(&volume, "xxx").expect(NO_COUNTER);

    let peer = format!("http://127.0.0.1:{}", free_port());
    etcd.child = Etcd::spawn(&world, &etcd.url.clone(), &peer, None);
    etcd.ready(&counted);
    let read = end(&mut counted.run(&volume, &dd("if", "bs=3 count=1"))).expect(0);
    assert_eq!(read.stdout, "new");
}

/// A certificate of its own for 127.0.0.1, `NAME.crt` and `NAME.key`.
fn certificate(world: &World, name: &str) -> Option<PathBuf> {
    if !on_path("openssl") {
        skip("openssl is not installed");
        return None;
    }
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
    command.args(["-nodes", "-days", "2", "-subj", "/CN=t", "-addext"]);
    command.args(["subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]);
    command.args(["-keyout", &format!("{name}.key"), "-out", &format!("{name}.crt")]);
    end(command.current_dir(world.directory())).expect(0);
    Some(world.path(name))
}

#[test]
fn etcd_is_believed_only_under_its_certificate_and_answers_only_to_a_login() {
    let Some(world) = World::new() else { return };
    let Some(own) = certificate(&world, "own") else { return };
    let Some(other) = certificate(&world, "other") else { return };
    let Some(mut etcd) = Etcd::start(&world, Some(&own)) else { return };
    if !on_path("etcdctl") {
        return skip("etcdctl is not installed (Debian: etcd-client)");
    }
    let with = |ca: &Path, login: Option<&str>| {
        let mut counted = Counted::new(&world, etcd.counter("k"));
        counted.options.push("--counter-ca".into());
        counted.options.push(ca.with_extension("crt").into());
        if let Some(login) = login {
            fs::write(world.path(login), format!("{login}\n")).unwrap();
            counted.options.extend(["--counter-login".into(), login.into()]);
        }
        counted
    };
    let (trusted, mistaken) = (with(&own, None), with(&other, None));
    let (known, unknown) = (with(&own, Some("root:secret")), with(&own, Some("root:guess")));
    let url = etcd.url.clone();
    etcd.ready(&trusted);
    let show = |counted: &Counted<'_>| {
        let mut command = world.postern(["counter", "show"]);
        end(command.args(&counted.options[1..]))
    };
    show(&trusted).expect(0);
    show(&mistaken).expect_line(NO_COUNTER, "certificate");
    let control = |words: &[&str]| {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").current_dir(world.directory());
        command.args(["--cacert", "own.crt", "--endpoints", &url]).args(words);
        end(&mut command).expect(0);
    };
    control(&["user", "add", "root:secret"]);
    control(&["user", "grant-role", "root", "root"]);
    control(&["auth", "enable"]);
    show(&trusted).expect_line(NO_COUNTER, "refuses");
    show(&unknown).expect_line(NO_COUNTER, "refuses");
    show(&known).expect(0);
    let volume = known.format();
    known.write(&volume, "one").expect(0);
    assert!(show(&known).expect(0).stdout.starts_with("postern1 "));
}
