//! What the probes must know of the running kernel: where members lie, where functions are, which
//! process is meant. Found at run time, so that one object fits every kernel.

use std::os::unix::fs::MetadataExt;

use postern_ebpf_common::config::{Config, WORDS};

use super::btf::KernelTypes;

/// The words of the probes' configuration.
pub type Words = [u64; WORDS];

/// Inode of the initial process-id namespace (`PROC_PID_INIT_INO`, include/linux/proc_ns.h).
const INITIAL_PID_NAMESPACE: u64 = 0xefff_fffc;

/// `(word, member of pt_regs, bytes behind it)`: the six arguments of a system call as they
/// are when it returns, where the first register may hold the result already.
#[cfg(target_arch = "x86_64")]
const ARGUMENTS: [(Config, &str, u64); 6] = [
    (Config::ArgContext, "di", 0),
    (Config::ArgCount, "si", 0),
    (Config::ArgPointers, "dx", 0),
    (Config::ArgEvents, "r10", 0),
    (Config::ArgDescribed, "r8", 0),
    (Config::ArgLength, "r9", 0),
];
#[cfg(target_arch = "aarch64")]
const ARGUMENTS: [(Config, &str, u64); 6] = [
    (Config::ArgContext, "orig_x0", 0),
    (Config::ArgCount, "regs", 8),
    (Config::ArgPointers, "regs", 16),
    (Config::ArgEvents, "regs", 24),
    (Config::ArgDescribed, "regs", 32),
    (Config::ArgLength, "regs", 40),
];
#[cfg(target_arch = "riscv64")]
const ARGUMENTS: [(Config, &str, u64); 6] = [
    (Config::ArgContext, "orig_a0", 0),
    (Config::ArgCount, "a1", 0),
    (Config::ArgPointers, "a2", 0),
    (Config::ArgEvents, "a3", 0),
    (Config::ArgDescribed, "a4", 0),
    (Config::ArgLength, "a5", 0),
];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
const ARGUMENTS: [(Config, &str, u64); 6] = [
    (Config::ArgContext, "unknown architecture", 0),
    (Config::ArgCount, "unknown architecture", 0),
    (Config::ArgPointers, "unknown architecture", 0),
    (Config::ArgEvents, "unknown architecture", 0),
    (Config::ArgDescribed, "unknown architecture", 0),
    (Config::ArgLength, "unknown architecture", 0),
];

/// Members on the way from a block request to the AIO request it serves.
const MEMBERS: [(Config, &str, &str); 13] = [
    (Config::RequestBio, "request", "bio"),
    (Config::RequestStart, "request", "start_time_ns"),
    (Config::BioNext, "bio", "bi_next"),
    (Config::BioEndIo, "bio", "bi_end_io"),
    (Config::BioPrivate, "bio", "bi_private"),
    (Config::IomapDioIocb, "iomap_dio", "iocb"),
    (Config::BlkdevDioBio, "blkdev_dio", "bio"),
    (Config::BlkdevDioIocb, "blkdev_dio", "iocb"),
    (Config::KiocbComplete, "kiocb", "ki_complete"),
    (Config::AioKiocbRw, "aio_kiocb", "rw"),
    (Config::AioKiocbResult, "aio_kiocb", "ki_res"),
    (Config::AioKiocbContext, "aio_kiocb", "ki_ctx"),
    (Config::KioctxUserId, "kioctx", "user_id"),
];

/// What a bio of btrfs carries beside. A kernel without btrfs, or with btrfs in a module, whose types
/// stand elsewhere, does without.
const BTRFS: [(Config, &str, &str); 3] = [
    (Config::BtrfsBio, "btrfs_bio", "bio"),
    (Config::BtrfsEndIo, "btrfs_bio", "end_io"),
    (Config::BtrfsPrivate, "btrfs_bio", "private"),
];

/// Functions that tell what a bio belongs to. Without the first there is no way; of the others, a
/// kernel may lack some.
const FUNCTIONS: [(Config, &str); 8] = [
    (Config::AioCompleteRw, "aio_complete_rw"),
    (Config::BioChainEndIo, "bio_chain_endio"),
    (Config::IomapDioEndIo, "iomap_dio_bio_end_io"),
    (Config::BlkdevEndIo, "blkdev_bio_end_io"),
    (Config::BlkdevEndIoAsync, "blkdev_bio_end_io_async"),
    (Config::BtrfsSimpleEndIo, "btrfs_simple_end_io"),
    (Config::BtrfsDioEndIo, "btrfs_dio_end_io"),
    (Config::IoCompleteRw, "io_complete_rw"),
];

/// Sets in which process-id namespace the traced process has its number: one other than the initial
/// one (a container) is told to the kernel.
pub fn set_namespace(words: &mut Words) {
    // Without /proc nothing is known about namespaces: take the number as it is.
    let Ok(namespace) = std::fs::metadata("/proc/self/ns/pid") else { return };
    if namespace.ino() != INITIAL_PID_NAMESPACE {
        let device = namespace.dev();
        // The kernel's own encoding of a device number, not user space's.
        let device = u64::from(libc::major(device)) << 20 | u64::from(libc::minor(device));
        words[Config::PidNsDevice as usize] = device;
        words[Config::PidNsInode as usize] = namespace.ino();
    }
}

/// Sets where the arguments of a system call are.
///
/// # Errors
/// What the kernel lacks.
pub fn set_arguments(words: &mut Words, types: &KernelTypes) -> Result<(), String> {
    for (word, member, behind) in ARGUMENTS {
        let offset = types
            .offset("pt_regs", member)
            .ok_or_else(|| format!("a known layout of registers (`pt_regs.{member}`)"))?;
        words[word as usize] = offset + behind;
    }
    Ok(())
}

/// Sets what leads from a request of io_uring to its id and to the thread that submitted it.
///
/// # Errors
/// What the kernel lacks.
pub fn set_uring(words: &mut Words, types: &KernelTypes) -> Result<(), String> {
    let offset = |structure: &str, member: &str| {
        let found = types.offset(structure, member);
        found.ok_or_else(|| format!("this kernel has no `{structure}.{member}`"))
    };
    if (offset("io_kiocb", "cmd")?, offset("io_rw", "kiocb")?) != (0, 0) {
        return Err("a request of io_uring does not begin with its kiocb here".to_owned());
    }
    words[Config::IoReqResult as usize] = offset("io_kiocb", "cqe")?;
    // Since Linux 6.13 by way of what io_uring knows of the thread.
    let (task, inner) = match offset("io_kiocb", "tctx") {
        Ok(tctx) => (tctx, offset("io_uring_task", "task")?),
        Err(_) => (offset("io_kiocb", "task")?, u64::MAX),
    };
    words[Config::IoReqTask as usize] = task;
    words[Config::IoTaskTask as usize] = inner;
    Ok(())
}

/// Sets what leads from a completed bio to its AIO request. Leaves `words` alone on failure.
///
/// # Errors
/// What is missing, in words for the operator.
pub fn set_device(words: &mut Words, types: &KernelTypes) -> Result<(), String> {
    let symbols = std::fs::read_to_string("/proc/kallsyms")
        .map_err(|error| format!("/proc/kallsyms can not be read ({error})"))?;
    let mut found = *words;
    for (word, structure, member) in MEMBERS {
        found[word as usize] = types
            .offset(structure, member)
            .ok_or_else(|| format!("this kernel has no `{structure}.{member}`"))?;
    }
    for (word, name) in FUNCTIONS {
        found[word as usize] = address_of(&symbols, name).unwrap_or(0);
    }
    if found[Config::AioCompleteRw as usize] == 0 {
        return Err("the addresses of kernel functions are hidden: CAP_SYSLOG and \
             `sysctl kernel.kptr_restrict=1` show them"
            .to_owned());
    }
    let btrfs = BTRFS.map(|(word, structure, member)| (word, types.offset(structure, member)));
    if btrfs.iter().any(|(_, offset)| offset.is_none()) {
        found[Config::BtrfsSimpleEndIo as usize] = 0;
    }
    for (word, offset) in btrfs {
        found[word as usize] = offset.unwrap_or(u64::MAX);
    }
    // A zero would match a bio without completion function.
    for (word, _) in FUNCTIONS {
        if found[word as usize] == 0 {
            found[word as usize] = u64::MAX;
        }
    }
    *words = found;
    Ok(())
}

/// Address of the kernel function `name` (not one of a module); `None` if there is none, if there
/// are several, or if addresses are hidden.
fn address_of(symbols: &str, name: &str) -> Option<u64> {
    let mut found = None;
    for line in symbols.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(address), Some(kind), Some(symbol), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue; // A fourth field names a module.
        };
        // Link-time optimisation adds a suffix to what was local to a file.
        let base = symbol.split_once(".llvm.").map_or(symbol, |(base, _)| base);
        if base == name && matches!(kind, "t" | "T") {
            let address = u64::from_str_radix(address, 16).ok().filter(|a| *a != 0)?;
            if found.is_some_and(|other| other != address) {
                return None;
            }
            found = Some(address);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYMBOLS: &str = "\
ffffffff81000010 t helper
ffffffff81000020 T helper_two
ffffffff81000030 d helper_data
ffffffffc0000040 t of_module\t[driver]
ffffffff81000050 t lto_local.llvm.123456
ffffffff81000060 t twice
ffffffff81000070 t twice
0000000000000000 t hidden
";

    #[test]
    fn a_function_is_found_by_its_whole_name_and_only_in_the_kernel_itself() {
        assert_eq!(address_of(SYMBOLS, "helper"), Some(0xffff_ffff_8100_0010));
        assert_eq!(address_of(SYMBOLS, "helper_two"), Some(0xffff_ffff_8100_0020));
        assert_eq!(address_of(SYMBOLS, "helper_data"), None);
        assert_eq!(address_of(SYMBOLS, "of_module"), None);
        assert_eq!(address_of(SYMBOLS, "lto_local"), Some(0xffff_ffff_8100_0050));
        assert_eq!(address_of(SYMBOLS, "twice"), None, "nobody can tell which one is meant");
        assert_eq!(address_of(SYMBOLS, "hidden"), None);
    }
}
