//! Programs that others wrote, unmodified: each line runs natively in a plain directory and inside
//! in a protected one, and must say the same and end the same.

use std::{ffi::OsString, path::Path};

use crate::common::{Ended, World, end, on_path, skip};

/// Runs a line of the shell in a plain directory and in a protected one; both must end with 0 and
/// the same words. Skips, loudly, where one of `programs` is missing.
pub fn same(programs: &[&str], line: &str) {
    let Some(world) = World::new() else { return };
    if let Some(missing) = programs.iter().find(|program| !on_path(program)) {
        return skip(&format!("{missing} is not installed"));
    }
    let plain = world.path("plain");
    std::fs::create_dir(&plain).unwrap();
    let native = end(world.command("sh").args(["-c", line]).current_dir(&plain)).expect(0);
    let inside = inside(&world, line).expect(0);
    assert_eq!(
        inside.stdout, native.stdout,
        "\ninside: {}\nnative: {}",
        inside.stderr, native.stderr
    );
    let directory = world.path("d");
    let verified = end(&mut world.postern([Path::new("verify"), &directory]));
    verified.expect(0);
}

fn inside(world: &World, line: &str) -> Ended {
    let mut shown = OsString::from("/data/=");
    shown.push(world.path("d"));
    let mut command = world.postern(["run", "--no-probes", "--create", "1M", "--volume"]);
    command.arg(shown).args(["--", "sh", "-c"]).arg(format!("cd /data && {line}"));
    end(&mut command)
}

/// What all fio lines share.
const FIO: &str = "fio --minimal --output=o --size=2m --bs=4k --rw=randrw --verify=crc32c \
                   --verify_fatal=1 --verify_state_save=0";

#[test]
fn fio_lays_out_a_volume_that_is_new() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "64M");
    let layout = ["--rw=randrw", "--size=8m", "--verify=crc32c", "--iodepth=8"];
    world.fio(&volume, &layout).expect(0);
    // A larger file: fio removes what is there first.
    world.fio(&volume, &["--rw=randread", "--size=16m", "--iodepth=8"]).expect(0);
    world.fio(&volume, &["--rw=randwrite", "--size=1m", "--unlink=1"]).expect(0);
    let mut line = world.run(&volume, ["sh", "-c", "wc -c < /sealed/data"]);
    assert_eq!(end(&mut line).expect(0).stdout, "0\n", "removed, and empty in the next run");
}

#[test]
fn fio_verifies_with_each_of_its_engines() {
    let engines = "libaio posixaio psync pvsync pvsync2 sync vsync mmap";
    same(
        &["fio"],
        &format!(
            "for engine in {engines}; do for direct in 0 1; do for fdatasync in 0 9; do \
             {FIO} --name=x --filename=f --ioengine=$engine --direct=$direct --iodepth=8 \
             --fdatasync=$fdatasync || echo $engine $direct fails; done; done; done; \
             {FIO} --name=x --filename=f --ioengine=libaio --direct=1 --iodepth=16 \
             --userspace_reap --iodepth_batch=8 --iodepth_batch_complete_min=4; wc -c f"
        ),
    );
}

#[test]
fn fio_verifies_files_of_forked_jobs_and_of_threads() {
    same(
        &["fio"],
        &format!(
            "for thread in 0 1; do {FIO} --name=x --numjobs=3 --nrfiles=4 --thread=$thread \
             --ioengine=libaio --direct=1 --iodepth=8 --group_reporting --unlink=1; ls; \
             {FIO} --name=m --numjobs=3 --nrfiles=2 --thread=$thread --ioengine=mmap \
             --fdatasync=50 || echo mapped files fail; rm m.*; done; \
             {FIO} --name=x --filename=one --numjobs=4 --size=1m --offset_increment=1m \
             --ioengine=libaio --direct=1 --iodepth=8; wc -c one"
        ),
    );
}

#[test]
fn stress_ng_finds_nothing_wrong() {
    let stressors = "--aiol 1 --aio 1 --hdd 1 --rename 1 --seek 1 --sync-file 1 --dentry 1 \
                     --flock 1 --getdent 1";
    same(
        &["stress-ng"],
        &format!(
            "stress-ng --temp-path . --timeout 20 --aiol-ops 200 --aio-ops 200 --hdd-ops 2000 \
             --rename-ops 200 --seek-ops 2000 --sync-file-ops 20 --dentry-ops 100 \
             --flock-ops 500 --getdent-ops 50 --dentries 50 --verify --quiet {stressors} 2>&1 && ls"
        ),
    );
}

#[test]
fn sysbench_runs_on_files_it_prepared_and_cleans_up() {
    same(
        &["sysbench"],
        "for mode in async sync mmap; do for step in prepare run cleanup; do \
         flags=direct; test $mode = mmap && flags=; \
         sysbench fileio --file-total-size=4M --file-num=4 --file-test-mode=rndrw --time=0 \
         --events=500 --file-io-mode=$mode --file-extra-flags=$flags $step > /dev/null \
         || echo $mode $step; ls; done; done",
    );
}

#[test]
fn ioping_measures_a_directory_and_a_file() {
    same(
        &["ioping"],
        "dd if=/dev/zero of=f bs=64k count=16 status=none; \
         for how in '-A -D .' '-D .' '-D -W .' '-A -D f' '-L f' '-D -W -W -W f'; do \
         ioping -q -c 5 -i 0 $how > /dev/null || echo $how; done; ls",
    );
}

#[test]
fn qemu_keeps_an_image_by_native_aio() {
    let work = "qemu-io -t none -i native -f qcow2 -c 'write -P 90 0 1M' -c 'aio_write -P 34 4M 64k' \
                -c aio_flush -c 'read -P 90 0 1M' -c 'read -P 34 4M 64k' -c 'discard 0 64k' -c flush";
    same(
        &["qemu-img", "qemu-io"],
        &format!(
            "qemu-img create -q -f qcow2 a 16M && {work} a > o && grep -c fail o; \
             qemu-img check -q a && qemu-img convert -t none -O raw a b && qemu-img compare a b; \
             qemu-img snapshot -c s a && qemu-img resize -q a 32M && qemu-img check -q a && md5sum b"
        ),
    );
}

#[test]
fn sqlite_commits_with_every_journal_of_files() {
    same(
        &["sqlite3"],
        "for mode in delete truncate persist memory; do rm -f x; sqlite3 x \"\
         pragma journal_mode=$mode; create table t(a, b); begin; insert into t select value, \
         hex(zeroblob(50)) from generate_series(1, 2000); commit; delete from t where a % 3; \
         vacuum;\"; sqlite3 x 'select count(*), sum(a) from t; pragma integrity_check'; done; \
         sqlite3 c 'create table t(a)'; for job in 1 2 3; do (for n in 1 2 3; do \
         sqlite3 -cmd '.timeout 60000' c \"insert into t values($job * 10 + $n)\"; done) & done; \
         wait; sqlite3 c 'select count(*), sum(a) from t; pragma integrity_check'",
    );
}

/// The index of the log is a mapping that its processes share and store to.
#[test]
fn sqlite_commits_with_a_write_ahead_log_and_reads_by_mappings() {
    same(
        &["sqlite3"],
        "sqlite3 x 'pragma journal_mode=wal; create table t(a, b); begin; insert into t select \
         value, hex(zeroblob(50)) from generate_series(1, 2000); commit; delete from t where a % 3'; \
         sqlite3 x 'select count(*), sum(a) from t; pragma integrity_check'; \
         for job in 1 2 3; do (for n in 1 2 3; do sqlite3 -cmd '.timeout 60000' x \
         \"insert into t values($job * 10 + $n, 7)\"; done) & done; wait; \
         sqlite3 x 'pragma mmap_size=1000000; select count(*), sum(a) from t; insert into t \
         values(5, 5); select count(*), sum(a) from t; pragma wal_checkpoint(truncate); pragma \
         integrity_check'; ls; for job in 1 2; do (yes 'insert into t values(1, 1);' | head -20 | \
         sqlite3 -cmd '.timeout 60000' x) & done; wait; sqlite3 x 'select count(*), sum(a) from t; \
         pragma integrity_check'",
    );
}

#[test]
fn file_tools_copy_pack_and_compare() {
    same(
        &["tar", "cmp"],
        "mkdir a; for n in 1 2 3 4 5; do seq $n 5000 > a/$n; done; tar cf t a; mkdir x; \
         tar xf t -C x && diff -r a x/a; cp -a a b && cp --sparse=always a/1 b/ && diff -r a b; \
         mv b c; gzip -kn a/1 && zcat a/1.gz | cmp - a/1; dd if=a/2 of=d bs=4k iflag=direct \
         status=none; cmp a/2 d; split -l 100 a/3 p.; cat p.* | cmp - a/3; sort -R a/4 | sort -n \
         | cmp - a/4; sed -i s/7/seven/ a/5; md5sum a/* c/*; truncate -s 100 d; wc -c d; \
         install -m 750 d e; stat -c %a e; find . -type f | wc -l; rm -r a c x; ls",
    );
}

/// dash starts programs by vfork and waits for its jobs by a signal's handler.
#[test]
fn a_shell_that_has_run_a_program_in_the_directory_still_hears_of_its_jobs() {
    same(
        &["sh"],
        "env true; (seq 5 > a; env true) & (seq 6 > b) & wait; env sort a b | md5sum; \
         (env sleep 0) & wait; echo waited",
    );
}

#[test]
fn processes_of_a_shell_append_to_one_file() {
    same(
        &["bash"],
        "bash -c 'for i in 1 2 3 4; do (for j in {1..25}; do echo line $i $j >> log; done) & done; \
         wait; sort log | md5sum; exec 12>>log; for i in 1 2 3; do seq 100 >&12 & done; wait; \
         sort log | md5sum; sh -c \"exec 9>nine; echo a >&9; sh -c \\\"echo b >&9\\\"; cat nine\"'",
    );
}

/// A program that the library cannot be loaded into meets neither file nor name, and leaves no
/// plain byte on the host.
#[test]
fn a_static_child_reaches_nothing_and_leaves_no_plain_text() {
    let Some(world) = World::new() else { return };
    if !on_path("cc") {
        return skip("no C compiler");
    }
    let (source, program) = (world.path("s.c"), world.path("s"));
    let text = "#include <stdio.h>\nint main(int n, char **v) { FILE *f = fopen(v[1], \"w\");\n\
                if (!f) return 3; fputs(\"TOP\", f); fputs(\"SECRETMARK\", f);\n\
                return n - 2 + fclose(f); }\n";
    std::fs::write(&source, text).unwrap();
    let mut compile = world.command("cc");
    compile.args(["-static", "-o"]).arg(&program).arg(&source);
    if end(&mut compile).code() != 0 {
        return skip("no static C library");
    }
    let program = program.display();
    inside(&world, &format!("{program} /data/plain; echo $?; {program} plain; echo $?; ls"))
        .expect(0);
    let mut grep = world.command("grep");
    let found = end(grep.args(["-rlc", "TOPSECRETMARK", "."]));
    assert_eq!((found.code(), found.stdout.as_str()), (1, ""), "on the host");
    assert!(!Path::new("/data/plain").exists());
}
