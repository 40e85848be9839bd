//! What the loader tells the probes before they are loaded: one array of words in their read-only
//! data, so that the verifier sees constants.

/// Name of the array in the object.
pub const SYMBOL: &str = "CONFIG";

macro_rules! words {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// Index of a word.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Config {
            $($(#[doc = $doc])* $name,)*
        }

        /// Number of words.
        pub const WORDS: usize = [$(Config::$name),*].len();
    };
}

words! {
    /// Device (the kernel's `dev_t`) of the process-id namespace that the traced process is counted
    /// in; 0 for the initial one.
    PidNsDevice,
    /// Inode of that namespace.
    PidNsInode,
    /// Byte offset in `struct pt_regs` of the first three arguments of a system call.
    ArgContext,
    /// See [`Self::ArgContext`].
    ArgCount,
    /// See [`Self::ArgContext`].
    ArgPointers,
    /// Byte offset in `struct pt_regs` of the fourth argument.
    ArgEvents,
    /// Byte offset in `struct pt_regs` of the fifth and sixth argument.
    ArgDescribed,
    /// See [`Self::ArgDescribed`].
    ArgLength,
    /// Byte offsets of members; `request.bio`.
    RequestBio,
    /// `bio.bi_next`.
    BioNext,
    /// `bio.bi_end_io`.
    BioEndIo,
    /// `bio.bi_private`.
    BioPrivate,
    /// `iomap_dio.iocb`.
    IomapDioIocb,
    /// `blkdev_dio.bio`.
    BlkdevDioBio,
    /// `blkdev_dio.iocb`.
    BlkdevDioIocb,
    /// `kiocb.ki_complete`.
    KiocbComplete,
    /// `aio_kiocb.rw`.
    AioKiocbRw,
    /// `aio_kiocb.ki_res`, whose first word is the `aio_data`.
    AioKiocbResult,
    /// `aio_kiocb.ki_ctx`.
    AioKiocbContext,
    /// `kioctx.user_id`.
    KioctxUserId,
    /// `request.start_time_ns`.
    RequestStart,
    /// Volumes with histograms of their own, and one more for all others.
    Volumes,
    /// `btrfs_bio.bio`; `u64::MAX` where the kernel does not describe btrfs.
    BtrfsBio,
    /// `btrfs_bio.end_io`.
    BtrfsEndIo,
    /// `btrfs_bio.private`.
    BtrfsPrivate,
    /// `io_kiocb.cqe` of a request of io_uring, whose first word is the `user_data`.
    IoReqResult,
    /// `io_kiocb.tctx`, or `io_kiocb.task` where there is no such member.
    IoReqTask,
    /// `io_uring_task.task`; `u64::MAX` where [`Self::IoReqTask`] leads to the task itself.
    IoTaskTask,
    /// Addresses of kernel functions, `u64::MAX` if there is none: `aio_complete_rw`.
    AioCompleteRw,
    /// `bio_chain_endio`.
    BioChainEndIo,
    /// `iomap_dio_bio_end_io`.
    IomapDioEndIo,
    /// `blkdev_bio_end_io`.
    BlkdevEndIo,
    /// `blkdev_bio_end_io_async`.
    BlkdevEndIoAsync,
    /// `btrfs_simple_end_io`.
    BtrfsSimpleEndIo,
    /// `btrfs_dio_end_io`.
    BtrfsDioEndIo,
    /// `io_complete_rw`.
    IoCompleteRw,
}
