//! Images, signatures and keys as files.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use sgx_emu::KeyRoot;
use sgx_image::{Identity, Image, Options, SigningKey, Sigstruct, Symbols, convert};

use crate::{
    enclave::{ImageArgs, SignArgs},
    error::{Exit, Failure},
};

/// An image and the names of what is in it.
pub struct Loaded {
    /// The image.
    pub image: Image,
    /// Names, none for an SGXS file alone.
    pub symbols: Symbols,
}

impl Loaded {
    /// Reads an ELF or an SGXS file.
    pub fn read(args: &ImageArgs) -> Result<Self, Failure> {
        let file = read(&args.image, "cannot read the image")?;
        let place = args.image.display();
        let elf = file.starts_with(b"\x7fELF");
        let image = if elf {
            let options = Options {
                heap_bytes: args.heap,
                stack_bytes: args.stack,
                threads: args.threads,
                ssa_frame_pages: 1,
                debug: !args.no_panic_text,
            };
            let advice = "build the program for x86_64-fortanix-unknown-sgx";
            convert(&file, &options)
                .map_err(|error| Failure::new(Exit::CannotExecute, error, place, advice))?
        } else {
            let advice = "give an SGXS file, or the ELF file of the program";
            Image::parse(&file)
                .map_err(|error| Failure::new(Exit::CannotExecute, error, place, advice))?
        };
        let names = match &args.symbols {
            Some(path) => read(path, "cannot read the symbols")?,
            None => file,
        };
        Ok(Self { image, symbols: Symbols::of_elf(&names) })
    }
}

/// Reads a signature; nothing is verified.
pub fn signature(path: &Path) -> Result<Sigstruct, Failure> {
    Sigstruct::from_bytes(&read(path, "cannot read the signature")?).map_err(|error| {
        Failure::new(Exit::CannotExecute, error, path.display(), "give the file that was signed")
    })
}

/// Refuses a signature that is wrong, or of another image.
pub fn verify(loaded: &Loaded, signature: &Sigstruct, path: &Path) -> Result<(), Failure> {
    signature.verify().map_err(|error| {
        let advice = "sign the image again, and find out who changed this file";
        Failure::new(Exit::CannotExecute, error, path.display(), advice)
    })?;
    let (signed, image) = (signature.mrenclave(), loaded.image.mrenclave());
    if signed == image {
        return Ok(());
    }
    let what = format!("the signature is for {}, the image is {}", hex(&signed), hex(&image));
    let advice = "the image was changed after it was signed, or is laid out otherwise";
    Err(Failure::new(Exit::CannotExecute, what, path.display(), advice))
}

/// `postern enclave sign`.
pub fn sign(args: &SignArgs) -> Result<(), Failure> {
    let loaded = Loaded::read(&args.image)?;
    let text = read(&args.key, "cannot read the signing key")?;
    let advice = "make one by `openssl genrsa -3 3072`, and keep it where nobody else reads";
    let refused = |error| Failure::new(Exit::Key, error, args.key.display(), advice);
    let key = SigningKey::from_pem(&String::from_utf8_lossy(&text)).map_err(refused)?;
    let identity = Identity {
        product: args.product,
        version: args.security_version,
        date: today(),
        debug: args.debuggable,
    };
    let mrenclave = loaded.image.mrenclave();
    let signature = Sigstruct::sign(&mrenclave, &identity, &key).map_err(refused)?;
    write(&args.output, "sgxs", &loaded.image.to_sgxs())?;
    write(&args.output, "sig", &signature.as_bytes()[..])?;
    println!("MRENCLAVE  {}", hex(&mrenclave));
    println!("MRSIGNER   {}", hex(&signature.mrsigner()));
    Ok(())
}

/// Reads what takes the place of a CPU's secrets.
pub fn root(path: &Path) -> Result<KeyRoot, Failure> {
    let bytes = read(path, "cannot read the root of keys")?;
    bytes.try_into().map(KeyRoot::new).map_err(|_| {
        let advice = "make one by `head -c 16 /dev/urandom > FILE`";
        Failure::new(Exit::Key, "a root of keys has 16 bytes", path.display(), advice)
    })
}

fn read(path: &Path, doing: &str) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|error| Failure::io(doing, path.display(), &error))
}

fn write(name: &Path, end: &str, bytes: &[u8]) -> Result<(), Failure> {
    let mut path = name.as_os_str().to_owned();
    path.push(".");
    path.push(end);
    let path = PathBuf::from(path);
    fs::write(&path, bytes).map_err(|error| Failure::io("cannot write", path.display(), &error))
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Today as digits: 0x2026_1122 is the 22nd of November 2026.
fn today() -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    digits(since.as_secs() / 86_400)
}

/// The date `days` after the first of January 1970, as digits.
fn digits(days: u64) -> u32 {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let (mut year, mut day) = (1970, days);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    let decimal = year * 10_000 + month * 100 + day + 1;
    // Each decimal digit as a hexadecimal one; eight of them until the year 9999.
    (0..8).fold(0, |digits, place| {
        digits | ((decimal / 10_u64.pow(place) % 10) as u32) << (4 * place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_as_digits() {
        assert_eq!(digits(0), 0x1970_0101);
        assert_eq!(digits(59), 0x1970_0301);
        assert_eq!(digits(19_782), 0x2024_0229);
        assert_eq!(digits(20_788), 0x2026_1201);
    }
}
