//! Processes of a run that die of signals amid their calls: each dies as it would natively, and the
//! others of the run go on with the same files.

use crate::{
    common::{World, end, skip},
    programs::same,
};

/// A victim that works on `f` all the time, in the background; goes on once it has begun.
const VICTIM: &str = ": > f; sh -c 'while :; do echo x >> f; done' & p=$!; \
                      until [ $(stat -c %s f) -gt 200 ]; do :; done";

#[test]
fn who_dies_of_a_signal_leaves_the_others_what_they_share() {
    same(
        &[],
        &format!(
            "for s in KILL TERM SEGV BUS ABRT PIPE USR1 ALRM XCPU IO; do
                 {VICTIM}; kill -$s $p; wait $p; echo $s $?; head -c 4 f
             done 2>/dev/null
             {VICTIM}; kill -STOP $p; kill -KILL $p; wait $p; echo $?; head -c 4 f"
        ),
    );
}

#[test]
fn a_group_that_is_killed_amid_its_work_leaves_the_others_what_they_share() {
    same(
        &["setsid", "timeout"],
        "for n in 1 2 3 4 5; do
             : > f
             w='while :; do echo x >> f; done'
             setsid sh -c \"$w & $w & $w\" & p=$!
             until [ $(stat -c %s f) -gt 200 ]; do :; done
             kill -KILL -$p; wait $p; echo $?; head -c 4 f
         done 2>/dev/null
         timeout -s KILL 0.2 sh -c 'while :; do echo y > g; done'; echo $?
         timeout 0.2 sh -c 'while :; do echo y > g; done'; echo $?; rm -f g; echo z > g; cat g",
    );
}

#[test]
fn a_program_with_requests_in_flight_can_be_killed() {
    let Some(world) = World::new() else { return };
    if !crate::common::on_path("fio") {
        return skip("fio is not installed");
    }
    let volume = world.format("v", "64M");
    let line = "for s in KILL TERM KILL SEGV KILL; do
                    dd if=/dev/zero of=/sealed/data bs=1M count=8 2>/dev/null
                    fio --name=j --filename=/sealed/data --ioengine=libaio --iodepth=32 --direct=1 \
                        --rw=randwrite --bs=4k --size=8m --buffer_pattern=0xff --thread \
                        --time_based --runtime=60 > /dev/null 2>&1 & p=$!
                    while cmp -s -n 8388608 /sealed/data /dev/zero; do :; done
                    kill -$s $p; wait $p; echo $s
                done 2>/dev/null; cat /sealed/data | wc -c";
    let ended = end(&mut world.run(&volume, ["sh", "-c", line])).expect(0);
    assert_eq!(ended.stdout, "KILL\nTERM\nKILL\nSEGV\nKILL\n8388608\n", "{}", ended.stderr);
    let info = end(world.postern(["info", "--json"]).arg(&volume)).expect(0);
    assert!(info.stdout.contains("\"clean\":true"), "closed by its last user: {}", info.stdout);
}
