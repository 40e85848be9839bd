//! What a program of the target does with its standard library alone: output, arguments, threads,
//! channels, time, TCP. Nothing of it knows Postern or the runner.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use postern_enclave as _; // What the linker asks for.

fn main() {
    println!("Hello, world!");
    println!("arguments: {}", std::env::args().skip(1).collect::<Vec<_>>().join(" "));
    match std::env::args().nth(1).as_deref() {
        Some("panic") => panic!("as asked"),
        Some("system-call") => {
            // SAFETY: none: this is what an enclave must not do, and what strict mode is for.
            unsafe { core::arch::asm!("syscall", in("rax") 39, out("rcx") _, out("r11") _) };
            println!("a system call was made");
            return;
        }
        Some("null") => {
            // SAFETY: none: this is what a fault is tried with.
            let byte = unsafe { core::ptr::read_volatile(core::ptr::without_provenance::<u8>(8)) };
            println!("read {byte}");
            return;
        }
        _ => {}
    }

    let total = Arc::new(Mutex::new(0));
    for round in 0..20_u64 {
        let threads: Vec<_> = (0..3)
            .map(|number| {
                let total = total.clone();
                thread::spawn(move || *total.lock().expect("not poisoned") += round * number)
            })
            .collect();
        for thread in threads {
            thread.join().expect("a thread ends");
        }
    }
    println!("threads: {}", total.lock().expect("not poisoned"));

    let (sender, receiver) = mpsc::channel();
    let producer = thread::spawn(move || (0..1000_u64).try_for_each(|number| sender.send(number)));
    println!("channel: {}", receiver.iter().sum::<u64>());
    producer.join().expect("a thread ends").expect("somebody listens");

    let before = Instant::now();
    thread::sleep(Duration::from_millis(2));
    println!("time passes: {}", before.elapsed() > Duration::ZERO);

    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("somebody connects");
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes).expect("five bytes");
        stream.write_all(&bytes).expect("a reader");
    });
    let mut stream = TcpStream::connect(address).expect("the echo listens");
    stream.write_all(b"to me").expect("a reader");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).expect("five bytes");
    echo.join().expect("a thread ends");
    println!("echo: {}", String::from_utf8_lossy(&bytes));
}
