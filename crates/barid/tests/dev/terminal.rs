//! Commands on a terminal, which `script` (util-linux) makes.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::place::{PATIENCE, Place, pause};

/// A command on a terminal.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    /// All that it has written.
    written: Arc<Mutex<String>>,
}

impl Terminal {
    fn open(place: &Place, line: &str, (columns, rows): (u16, u16)) -> Self {
        let barid = env!("CARGO_BIN_EXE_barid");
        let line = format!("stty cols {columns} rows {rows}; exec '{barid}' {line}");
        let mut command = Command::new("script");
        command.args(["-qefc", &line, "/dev/null"]).env("TERM", "xterm").env("NO_COLOR", "1");
        place.settle(&mut command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (keys, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let written = Arc::new(Mutex::new(String::new()));
        let all = Arc::clone(&written);
        std::thread::spawn(move || {
            let mut bytes = [0; 4_096];
            while let Ok(read @ 1..) = stdout.read(&mut bytes) {
                all.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..read]));
            }
        });
        Self { child, keys, written }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    fn has(&self, text: &str) -> bool {
        self.written.lock().unwrap().contains(text)
    }

    fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.has(text) {
            assert!(Instant::now() < deadline, "no {text} in {}", self.written.lock().unwrap());
            pause();
        }
    }

    fn end(mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "{}", self.written.lock().unwrap());
            pause();
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Without its terminal, the command ends as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn hazard_156_keys_of_top_neither_wait_for_a_scrape_nor_begin_it_anew() {
    let place = Place::new();
    // It never answers, so that a scrape takes 2 s.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let line = format!("top --interval 100ms --admin {}", silent.local_addr().unwrap());
    let mut top = Terminal::open(&place, &line, (80, 24));
    top.wait_for("reading the admin endpoints");
    top.press("?");
    top.wait_for("scroll by a line");
    assert!(!top.has("no answer within 2 s"), "help came after the scrape");
    top.press("?");
    let begun = Instant::now();
    while !top.has("no answer within 2 s") {
        assert!(begun.elapsed() < Duration::from_secs(20), "no scrape ends while keys are pressed");
        top.press("j");
        pause();
    }
    top.press("q");
    assert_eq!(top.end(), Some(0));
}

#[test]
fn hazard_158_what_concerns_everyone_is_confirmed_by_a_word() {
    let place = Place::new();
    // Nobody listens there: the codes tell how far a command came.
    let redis = "--redis redis://127.0.0.1:1";
    let kafka = "--brokers 127.0.0.1:1 --timeout 1s";
    for (line, word, asked) in [
        (format!("kick --everyone {redis}"), "everyone", "closes all sessions of all apps"),
        (format!("kick --whole-app shop {redis}"), "shop", "closes all sessions of app shop"),
        (format!("revoke everyone {kafka}"), "everyone", "closes all sessions of all apps"),
        (format!("revoke app shop {kafka}"), "shop", "closes all sessions of app shop"),
    ] {
        let output = place.barid(&line).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{line}: {said}");
        assert!(said.contains("--yes") && said.contains(asked), "{line}: {said}");
        let output = place.barid(&format!("{line} --yes")).stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{line}: {output:?}");
        for (typed, code) in [("yes", 1), (word, 4)] {
            let mut terminal = Terminal::open(&place, &line, (200, 50));
            terminal.wait_for(&format!("Type {word} to go on: "));
            assert!(terminal.has(asked));
            terminal.press(&format!("{typed}\n"));
            if code == 1 {
                terminal.wait_for("nothing was done");
            }
            assert_eq!(terminal.end(), Some(code), "{line}: {typed}");
        }
    }
    let output = place.barid(&format!("kick --user a {redis}")).output().unwrap();
    assert_eq!(output.status.code(), Some(4), "one user is not asked for: {output:?}");
}
