//! Local attestation: two enclaves on one machine that prove to each other what they are (EREPORT).
//!
//! ```text
//! attest listen          says where it listens, and waits for the other one
//! attest ADDRESS         goes there
//! ```
//!
//! Each sends what a report for it must name (TARGETINFO) and a challenge; each answers by a report
//! over the other's challenge, whose MAC only that one can verify, with a key that this machine gives
//! to it alone (EGETKEY). A program of more use puts a hash of its public key beside the challenge,
//! and goes by MRSIGNER, product and security version of the other one.
//!
//! Holds: who is named has made this report on this machine, after the challenge was drawn.
//! Does not hold, in the emulator: that it is an enclave at all.

use core::arch::x86_64::_rdrand64_step;
use std::{
    fmt::Write as _,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::ExitCode,
};

use cmac::{Cmac, Mac as _};
use postern_enclave as _; // What the linker asks for.
use sgx_isa::{Report, Targetinfo};

/// What a report's data says: the challenge, and room for what else the two agree on.
type Data = [u8; 64];

fn main() -> ExitCode {
    let address = std::env::args().nth(1).unwrap_or_else(|| "listen".into());
    match attest(&address) {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("failed: {what}");
            ExitCode::FAILURE
        }
    }
}

fn attest(address: &str) -> Result<(), String> {
    let own = Report::for_self();
    println!("own   {}", hex(&own.mrenclave));
    let mut stream = if address == "listen" {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
        let local = listener.local_addr().map_err(|error| error.to_string())?;
        println!("listening at {local}");
        listener.accept().map_err(|error| error.to_string())?.0
    } else {
        TcpStream::connect(address).map_err(|error| error.to_string())?
    };

    let mut challenge: Data = [0; 64];
    random(&mut challenge[..32])?;
    let target = Targetinfo::from(own);
    let bytes: &[u8] = target.as_ref();
    send(&mut stream, bytes)?;
    send(&mut stream, &challenge)?;

    let mut target = [0; Targetinfo::UNPADDED_SIZE];
    let mut asked: Data = [0; 64];
    receive(&mut stream, &mut target)?;
    receive(&mut stream, &mut asked)?;
    let target = Targetinfo::try_copy_from(&target).ok_or("no TARGETINFO")?;
    let report = Report::for_target(&target, &asked);
    let bytes: &[u8] = report.as_ref();
    send(&mut stream, bytes)?;

    let mut report = [0; Report::UNPADDED_SIZE];
    receive(&mut stream, &mut report)?;
    let report = Report::try_copy_from(&report).ok_or("no REPORT")?;
    let made_here = report.verify(|key, body, mac| {
        let mut cmac = <Cmac<aes::Aes128> as cmac::Mac>::new(key.into());
        cmac.update(body);
        cmac.verify_slice(mac).is_ok()
    });
    if !made_here {
        return Err("the other one's report was not made on this machine for this enclave".into());
    }
    if report.reportdata != challenge {
        return Err("the other one's report is over another challenge".into());
    }
    println!("other {}", hex(&report.mrenclave));
    Ok(())
}

/// The CPU's randomness.
fn random(out: &mut [u8]) -> Result<(), String> {
    for chunk in out.chunks_mut(8) {
        let mut word = 0;
        // SAFETY: every CPU with SGX has RDRAND.
        let drawn = (0..32).any(|_| unsafe { _rdrand64_step(&mut word) } == 1);
        if !drawn {
            return Err("the CPU gives no randomness".into());
        }
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
    Ok(())
}

fn send(stream: &mut TcpStream, bytes: &[u8]) -> Result<(), String> {
    stream.write_all(bytes).map_err(|error| format!("the other one: {error}"))
}

fn receive(stream: &mut TcpStream, bytes: &mut [u8]) -> Result<(), String> {
    stream.read_exact(bytes).map_err(|error| format!("the other one: {error}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
