//! The bindings against the C headers of this machine, as the C compiler sees them.
#![allow(clippy::unwrap_used)]

use libaio_sys::*;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

/// Compiles `source`, runs it, and gives the `name number` lines it prints; `None` without a
/// compiler.
fn c_says(name: &str, source: &str) -> Option<BTreeMap<String, i64>> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (file, program) = (directory.join(format!("{name}.c")), directory.join(name));
    std::fs::write(&file, source).unwrap();
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let output =
        Command::new(&compiler).args(["-Wall", "-Werror", "-o"]).args([&program, &file]).output();
    let output = match output {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            skipped(format_args!("no C compiler `{compiler}`; install one or set CC"));
            return None;
        }
        output => output.unwrap(),
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = Command::new(&program).output().unwrap();
    assert!(output.status.success());
    let lines = String::from_utf8(output.stdout).unwrap();
    let line = |line: &str| {
        let (name, number) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), number.parse().unwrap())
    };
    Some(lines.lines().map(line).collect())
}

/// A program that prints each of `expressions` and its value.
fn program(includes: &str, checks: &str, expressions: &[(&str, i64)]) -> String {
    let prints: String = expressions
        .iter()
        .map(|(text, _)| format!("  printf(\"%s %lld\\n\", \"{text}\", (long long)({text}));\n"))
        .collect();
    format!(
        "#include <stddef.h>\n#include <stdio.h>\n{includes}\n{checks}\n\
         int main(void) {{\n{prints}  return 0;\n}}\n"
    )
}

fn compare(name: &str, includes: &str, checks: &str, expressions: &[(&str, i64)]) {
    let Some(said) = c_says(name, &program(includes, checks, expressions)) else { return };
    assert_eq!(said.len(), expressions.len());
    for (text, ours) in expressions {
        assert_eq!(said[*text], *ours, "{text}");
    }
}

macro_rules! sizes {
    ($($ty:ident: $($member:ident)*;)*) => {
        vec![$(
            (concat!("sizeof(struct ", stringify!($ty), ")"), size_of::<$ty>() as i64),
            $((
                concat!("offsetof(struct ", stringify!($ty), ", ", stringify!($member), ")"),
                offset_of!($ty, $member) as i64,
            ),)*
        )*]
    };
}

macro_rules! numbers {
    ($($name:ident)*) => { [$((stringify!($name), i64::from($name)),)*] };
}

#[test]
fn structs_and_opcodes_are_those_of_libaio_h() {
    let mut expressions = sizes! {
        iocb: data key aio_rw_flags aio_lio_opcode aio_reqprio aio_fildes u;
        io_event: data obj res res2;
        io_iocb_common: buf nbytes offset __pad3 flags resfd;
        io_iocb_vector: vec nr offset;
        io_iocb_poll: events __pad1;
        io_iocb_sockaddr: addr len;
    };
    expressions.extend(numbers! {
        IO_CMD_PREAD IO_CMD_PWRITE IO_CMD_FSYNC IO_CMD_FDSYNC IO_CMD_POLL IO_CMD_NOOP
        IO_CMD_PREADV IO_CMD_PWRITEV
    });
    compare("libaio_h", "#include <libaio.h>", "", &expressions);
}

#[test]
fn functions_have_the_types_of_libaio_h() {
    let checks: String = [
        ("io_setup", "int (int, io_context_t *)"),
        ("io_destroy", "int (io_context_t)"),
        ("io_submit", "int (io_context_t, long, struct iocb **)"),
        ("io_cancel", "int (io_context_t, struct iocb *, struct io_event *)"),
        ("io_getevents", "int (io_context_t, long, long, struct io_event *, struct timespec *)"),
        (
            "io_pgetevents",
            "int (io_context_t, long, long, struct io_event *, struct timespec *, sigset_t *)",
        ),
        ("io_queue_init", "int (int, io_context_t *)"),
        ("io_queue_release", "int (io_context_t)"),
        ("io_queue_run", "int (io_context_t)"),
        ("*(io_callback_t)0", "void (io_context_t, struct iocb *, long, long)"),
    ]
    .iter()
    .map(|(function, ty)| {
        format!(
            "_Static_assert(__builtin_types_compatible_p(__typeof__({function}), {ty}), \
             \"{function}\");\n"
        )
    })
    .collect();
    let expressions =
        [("sizeof(io_context_t)", size_of::<io_context_t>() as i64), ("sizeof(long)", 8)];
    compare("libaio_h_functions", "#include <libaio.h>", &checks, &expressions);
}

/// The kernel's names for the same bytes.
#[test]
fn structs_flags_and_opcodes_are_those_of_linux_aio_abi_h() {
    let common = offset_of!(iocb, u);
    let mut expressions = vec![
        ("sizeof(struct iocb)", size_of::<iocb>()),
        ("offsetof(struct iocb, aio_data)", offset_of!(iocb, data)),
        ("offsetof(struct iocb, aio_key)", offset_of!(iocb, key)),
        ("offsetof(struct iocb, aio_rw_flags)", offset_of!(iocb, aio_rw_flags)),
        ("offsetof(struct iocb, aio_lio_opcode)", offset_of!(iocb, aio_lio_opcode)),
        ("offsetof(struct iocb, aio_reqprio)", offset_of!(iocb, aio_reqprio)),
        ("offsetof(struct iocb, aio_fildes)", offset_of!(iocb, aio_fildes)),
        ("offsetof(struct iocb, aio_buf)", common + offset_of!(io_iocb_common, buf)),
        ("offsetof(struct iocb, aio_nbytes)", common + offset_of!(io_iocb_common, nbytes)),
        ("offsetof(struct iocb, aio_offset)", common + offset_of!(io_iocb_common, offset)),
        ("offsetof(struct iocb, aio_reserved2)", common + offset_of!(io_iocb_common, __pad3)),
        ("offsetof(struct iocb, aio_flags)", common + offset_of!(io_iocb_common, flags)),
        ("offsetof(struct iocb, aio_resfd)", common + offset_of!(io_iocb_common, resfd)),
        ("sizeof(struct io_event)", size_of::<io_event>()),
        ("offsetof(struct io_event, data)", offset_of!(io_event, data)),
        ("offsetof(struct io_event, obj)", offset_of!(io_event, obj)),
        ("offsetof(struct io_event, res)", offset_of!(io_event, res)),
        ("offsetof(struct io_event, res2)", offset_of!(io_event, res2)),
    ]
    .into_iter()
    .map(|(text, number)| (text, number as i64))
    .collect::<Vec<_>>();
    expressions.extend([
        ("IOCB_CMD_PREAD", i64::from(IO_CMD_PREAD)),
        ("IOCB_CMD_PWRITE", i64::from(IO_CMD_PWRITE)),
        ("IOCB_CMD_FSYNC", i64::from(IO_CMD_FSYNC)),
        ("IOCB_CMD_FDSYNC", i64::from(IO_CMD_FDSYNC)),
        ("IOCB_CMD_POLL", i64::from(IO_CMD_POLL)),
        ("IOCB_CMD_NOOP", i64::from(IO_CMD_NOOP)),
        ("IOCB_CMD_PREADV", i64::from(IO_CMD_PREADV)),
        ("IOCB_CMD_PWRITEV", i64::from(IO_CMD_PWRITEV)),
    ]);
    expressions.extend(numbers! { IOCB_FLAG_RESFD IOCB_FLAG_IOPRIO });
    compare("aio_abi_h", "#include <linux/aio_abi.h>", "", &expressions);
}

/// Past the test harness, which swallows what a passing test prints.
fn skipped(why: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}
