//! `postern enclave`: SGX enclave images on a machine with or without SGX.
//!
//! An image is given as the ELF file that the target x86_64-fortanix-unknown-sgx makes, laid out
//! here, or as an SGXS file, which is what is measured and signed.

mod execute;
mod files;

use std::{
    ffi::OsString,
    io::{ErrorKind, Write},
    path::PathBuf,
};

use clap::{Args, Subcommand, ValueEnum};
use sgx_image::{Dump, Finding, Sigstruct, scan};

use crate::{
    enclave::files::{Loaded, hex},
    error::{Exit, Failure},
    size,
};

pub const EXAMPLES: &str = "\
Examples:
  Look at what a build has made, and sign it:
    postern enclave inspect target/x86_64-fortanix-unknown-sgx/release/program
    openssl genrsa -3 3072 > signing.pem
    postern enclave sign target/x86_64-fortanix-unknown-sgx/release/program \\
      --key signing.pem --output program

  Run it as it was signed; system calls and CPUID end it, as they would on hardware:
    postern enclave run program.sgxs --signature program.sig --strict -- arguments";

/// `postern enclave`.
#[derive(Debug, Subcommand)]
pub enum EnclaveCommand {
    /// Show what an image consists of, its measurement, and instructions that no enclave may have
    #[command(
        after_help = "Exit code 0: nothing forbidden. 126: instructions that no enclave can run."
    )]
    Inspect(InspectArgs),
    /// Make NAME.sgxs and NAME.sig of an image
    Sign(SignArgs),
    /// Run a program made for the target x86_64-fortanix-unknown-sgx
    #[command(
        after_help = "Exit code: 0, 101 if the program panicked or failed, or 128 + the signal that\n\
                      its fault is to a program outside (132, 136, 139, 159)."
    )]
    Run(RunArgs),
}

/// The image, and how an ELF file becomes one.
#[derive(Args, Debug)]
pub struct ImageArgs {
    /// The image: an ELF or an SGXS file
    pub image: PathBuf,
    /// Heap of the program (of an ELF file)
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "32M")]
    pub heap: u64,
    /// Stack of each thread (of an ELF file)
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "128K")]
    pub stack: u64,
    /// Threads that can be inside at once, the main one included (of an ELF file)
    #[arg(long, value_name = "NUMBER", default_value_t = 4)]
    pub threads: u32,
    /// Let the program tell the host nothing of its panics (of an ELF file)
    #[arg(long)]
    pub no_panic_text: bool,
    /// The ELF file that an SGXS file was made of, for the names of its functions
    #[arg(long, value_name = "FILE")]
    pub symbols: Option<PathBuf>,
}

/// `postern enclave inspect`.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// The image.
    #[command(flatten)]
    pub image: ImageArgs,
    /// Verify this signature, and show who signed
    #[arg(long, value_name = "FILE")]
    pub signature: Option<PathBuf>,
}

/// `postern enclave sign`.
#[derive(Args, Debug)]
pub struct SignArgs {
    /// The image.
    #[command(flatten)]
    pub image: ImageArgs,
    /// RSA key of 3072 bits with exponent 3, in PEM
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// Name of both files, without their ends
    #[arg(long, value_name = "NAME")]
    pub output: PathBuf,
    /// Product number
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub product: u16,
    /// Security version: raise it when an older one must not get the newer one's keys
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub security_version: u16,
    /// Let debuggers look into the enclave: its keys differ from those of one that they cannot
    #[arg(long)]
    pub debuggable: bool,
}

/// What runs an enclave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BackendArg {
    /// The CPU where the machine has SGX and the image is signed, else the emulator
    #[default]
    Auto,
    /// The emulator
    Emu,
    /// The CPU
    Hw,
}

/// `postern enclave run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// The image.
    #[command(flatten)]
    pub image: ImageArgs,
    /// Run it only if this signature is right; without one it has no signer, and can be debugged
    #[arg(long, value_name = "FILE")]
    pub signature: Option<PathBuf>,
    /// Run it only if its measurement is this one
    #[arg(long, value_name = "HEX")]
    pub mrenclave: Option<String>,
    /// What runs it: the CPU, or the emulator
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub backend: BackendArg,
    /// End it at a system call or CPUID, as hardware would
    #[arg(long)]
    pub strict: bool,
    /// Change no byte of its code: each exit traps, at ten times the cost
    #[arg(long)]
    pub exact: bool,
    /// Cycles to spend on each entry and each exit; hardware takes about 5000
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub transition_cycles: u64,
    /// Derive its keys from the 16 bytes in this file, as another machine would (emulator)
    #[arg(long, value_name = "FILE")]
    pub root: Option<PathBuf>,
    /// Let the program attach to the posternd that listens on this control socket
    #[arg(long, value_name = "SOCKET")]
    pub daemon: Option<PathBuf>,
    /// Say at the end how often the enclave was entered and left, and for what
    #[arg(long)]
    pub counts: bool,
    /// Arguments of the program
    #[arg(last = true, value_name = "ARGUMENT")]
    pub arguments: Vec<OsString>,
}

/// Does what was asked; the exit code of the command.
pub fn run(command: &EnclaveCommand) -> Result<u8, Failure> {
    match command {
        EnclaveCommand::Inspect(args) => inspect(args),
        EnclaveCommand::Sign(args) => files::sign(args).map(|()| 0),
        EnclaveCommand::Run(args) => execute::execute(args),
    }
}

fn inspect(args: &InspectArgs) -> Result<u8, Failure> {
    let loaded = Loaded::read(&args.image)?;
    let signature = match &args.signature {
        Some(path) => {
            let signature = files::signature(path)?;
            files::verify(&loaded, &signature, path)?;
            Some(signature)
        }
        None => None,
    };
    let found = scan(&loaded.image, &loaded.symbols);
    match show(&mut std::io::stdout().lock(), &loaded, signature.as_ref(), &found) {
        // Who has seen enough, as `head`, closes the pipe.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io("cannot write", "standard output", &error))
        }
        _ => Ok(if found.is_empty() { 0 } else { Exit::CannotExecute as u8 }),
    }
}

fn show(
    to: &mut impl Write,
    loaded: &Loaded,
    signature: Option<&Sigstruct>,
    found: &[Finding],
) -> std::io::Result<()> {
    writeln!(to, "MRENCLAVE  {}", hex(&loaded.image.mrenclave()))?;
    if let Some(signature) = signature {
        let identity = signature.identity();
        writeln!(to, "MRSIGNER   {}", hex(&signature.mrsigner()))?;
        writeln!(
            to,
            "signed     product {}, security version {}, {:08x}{}",
            identity.product,
            identity.version,
            identity.date,
            if identity.debug { ", debuggable" } else { "" }
        )?;
    }
    write!(to, "{}", Dump(&loaded.image))?;
    for finding in found {
        writeln!(to, "forbidden: {finding} (in {})", loaded.symbols.name(finding.offset))?;
    }
    writeln!(to, "code       {} forbidden instruction(s)", found.len())
}
