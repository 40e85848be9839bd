//! A real browser without a screen: Chromium, told what to do by messages of its debugging protocol
//! over two pipes.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use serde_json::{Value, json};

use crate::common::{World, on_path, skip, until};

/// An answer that takes longer never comes. Far above what any of them takes.
const HANGS_AFTER: Duration = Duration::from_secs(240);
/// How often a page is looked at while something is waited for.
const LOOK: Duration = Duration::from_millis(50);

/// A browser with one page; ended when dropped.
pub struct Browser {
    child: Child,
    orders: Option<ChildStdin>,
    answers: Receiver<Value>,
    last: u64,
    session: Option<String>,
    /// What the browser told beside answers.
    pub events: Vec<Value>,
}

impl Browser {
    /// Starts it; `None` (said loudly) where there is none.
    pub fn start(world: &World) -> Option<Self> {
        if !on_path("chromium") {
            skip("chromium is not installed (`cargo xtask setup`)");
            return None;
        }
        // Descriptors 3 and 4 are the protocol's.
        let mut command = world.command("sh");
        command.args(["-c", "exec chromium \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", "sh"]);
        command.args([
            "--headless",
            "--remote-debugging-pipe",
            // Root has no sandbox; the pages are our own.
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-breakpad",
            "--no-first-run",
        ]);
        command.arg(format!("--user-data-dir={}", world.path("browser").display()));
        command.arg("about:blank").env("HOME", world.directory());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let orders = child.stdin.take();
        let (send, answers) = channel();
        let from = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for message in from.split(0).map_while(Result::ok) {
                let _ = send.send(serde_json::from_slice(&message).unwrap());
            }
        });
        let events = Vec::new();
        let mut browser = Self { child, orders, answers, last: 0, session: None, events };
        let target = browser.ask("Target.createTarget", json!({ "url": "about:blank" }));
        let wanted = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.ask("Target.attachToTarget", wanted);
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Network", "Log"] {
            browser.ask(&format!("{domain}.enable"), json!({}));
        }
        Some(browser)
    }

    /// Has a method of the protocol done; answers its result.
    #[track_caller]
    pub fn ask(&mut self, method: &str, params: Value) -> Value {
        self.last += 1;
        let mut order = json!({ "id": self.last, "method": method, "params": params });
        if let Some(session) = &self.session {
            order["sessionId"] = session.as_str().into();
        }
        let mut bytes = order.to_string().into_bytes();
        bytes.push(0);
        self.orders.as_mut().unwrap().write_all(&bytes).unwrap();
        loop {
            let said = self.answers.recv_timeout(HANGS_AFTER);
            let said = said.unwrap_or_else(|error| panic!("no answer to {method}: {error}"));
            if said["id"] == self.last {
                assert!(said.get("error").is_none(), "{method}: {said}");
                return said["result"].clone();
            }
            self.events.push(said);
        }
    }

    /// Shows a page.
    #[track_caller]
    pub fn open(&mut self, address: &str) {
        let answer = self.ask("Page.navigate", json!({ "url": address }));
        assert!(answer.get("errorText").is_none(), "{address}: {answer}");
        self.until_true("document.readyState === 'complete' && location.href !== 'about:blank'");
    }

    /// The value of an expression on the page.
    #[track_caller]
    pub fn value(&mut self, expression: &str) -> Value {
        let params = json!({
            "expression": expression, "returnByValue": true, "awaitPromise": true,
        });
        let answer = self.ask("Runtime.evaluate", params);
        assert!(answer.get("exceptionDetails").is_none(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Waits until an expression on the page is true.
    #[track_caller]
    pub fn until_true(&mut self, expression: &str) {
        until(expression, || {
            let is = self.value(expression) == true;
            if !is {
                std::thread::sleep(LOOK);
            }
            is.then_some(())
        });
    }

    /// Presses a key that has no character, or Enter.
    #[track_caller]
    pub fn press(&mut self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, ""),
            "Enter" => (13, "\r"),
            "Escape" => (27, ""),
            "ArrowLeft" => (37, ""),
            other => panic!("no code for {other}"),
        };
        for kind in ["keyDown", "keyUp"] {
            let text = if kind == "keyDown" { text } else { "" };
            let params = json!({
                "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text,
            });
            self.ask("Input.dispatchKeyEvent", params);
        }
    }

    /// Gives the page this width and height.
    pub fn size(&mut self, width: u32, height: u32) {
        let params =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.ask("Emulation.setDeviceMetricsOverride", params);
        self.until_true(&format!("window.innerWidth === {width}"));
    }

    /// Has the system's theme be `light` or `dark`.
    pub fn theme(&mut self, theme: &str) {
        let feature = json!([{ "name": "prefers-color-scheme", "value": theme }]);
        self.ask("Emulation.setEmulatedMedia", json!({ "features": feature }));
    }

    /// Fails if a script failed, or if the page asked for anything that `allowed` does not begin.
    #[track_caller]
    pub fn expect_clean(&mut self, allowed: &[&str]) {
        self.value("1");
        let mut asked = 0;
        for event in &self.events {
            match event["method"].as_str().unwrap_or_default() {
                "Runtime.exceptionThrown" => panic!("{event}"),
                "Log.entryAdded" => {
                    let entry = &event["params"]["entry"];
                    // Of the network each question to a daemon that is gone, or wants a token.
                    assert!(entry["level"] != "error" || entry["source"] == "network", "{event}");
                }
                "Network.requestWillBeSent" => {
                    let url = event["params"]["request"]["url"].as_str().unwrap();
                    asked += 1;
                    assert!(allowed.iter().any(|begin| url.starts_with(begin)), "{url}");
                }
                _ => {}
            }
        }
        assert!(asked > 0);
    }

    /// Keeps a picture of what is seen.
    pub fn picture(&mut self, file: &Path) {
        let answer = self.ask("Page.captureScreenshot", json!({ "format": "png" }));
        let mut decode = Command::new("base64");
        decode.arg("-d").stdin(Stdio::piped()).stdout(std::fs::File::create(file).unwrap());
        let mut decoded = decode.spawn().unwrap();
        let data = answer["data"].as_str().unwrap();
        decoded.stdin.take().unwrap().write_all(data.as_bytes()).unwrap();
        assert!(decoded.wait().unwrap().success());
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Without orders to come it ends; its profile goes with the test's directory.
        drop(self.orders.take());
        if std::thread::panicking() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
