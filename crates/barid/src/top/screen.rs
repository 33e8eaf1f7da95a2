//! The terminal: its alternate screen, and the keys that are pressed.

use std::io::{self, IsTerminal as _, Read as _, Write as _};

use rustix::termios::{self, LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use tokio::sync::mpsc;

use super::sample::Sample;
use super::show::{self, View};
use crate::output::Output;

/// The size of a terminal that does not tell its own.
const SIZE: (usize, usize) = (80, 24);
/// Lines that PgUp and PgDn scroll by.
const PAGE: usize = 10;

/// A key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    Char(char),
    Enter,
    Escape,
    Backspace,
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
}

/// The terminal's alternate screen. On drop, the terminal is as it was.
pub struct Screen {
    before: Option<Termios>,
}

impl Screen {
    /// Opens the screen. Keys are read without Enter if stdin is the terminal; Ctrl-C stays a signal.
    pub fn open() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = if stdin.is_terminal() { termios::tcgetattr(&stdin).ok() } else { None };
        if let Some(before) = &before {
            let mut keys = before.clone();
            keys.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
            // A read ends after a tenth of a second, so that the end of an escape sequence is known.
            keys.special_codes[SpecialCodeIndex::VMIN] = 0;
            keys.special_codes[SpecialCodeIndex::VTIME] = 1;
            termios::tcsetattr(&stdin, OptionalActions::Now, &keys)?;
        }
        write("\x1b[?1049h\x1b[?25l")?;
        Ok(Self { before })
    }

    /// The keys from now on; none if stdin is no terminal.
    pub fn keys(&self) -> mpsc::Receiver<Key> {
        let (keys, pressed) = mpsc::channel(64);
        if self.before.is_some() {
            // The thread ends with the process, or with the receiver.
            std::thread::spawn(move || {
                let mut bytes = [0; 64];
                while !keys.is_closed() {
                    match io::stdin().lock().read(&mut bytes) {
                        Ok(read) => parse(&bytes[..read]).into_iter().for_each(|key| {
                            // Keys beyond what can be drawn are dropped.
                            let _ = keys.try_send(key);
                        }),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
            });
        }
        pressed
    }

    /// Draws a page; `None`: there is no sample yet.
    pub fn draw(
        &self,
        sample: Option<&Sample>,
        every: &str,
        view: &mut View,
        out: Output,
    ) -> io::Result<()> {
        let size = size().unwrap_or(SIZE);
        // Overwrite in place to avoid flicker, and erase the rest of each line and of the screen.
        let mut frame = String::from("\x1b[H");
        let lines = match sample {
            Some(sample) => show::page(sample, size, every, view, out),
            None => show::first_page(size, view, out),
        };
        let count = lines.len();
        for (index, line) in lines.into_iter().enumerate() {
            frame += &line;
            frame += if index + 1 < count { "\x1b[K\r\n" } else { "\x1b[K" };
        }
        frame += "\x1b[J";
        write(&frame)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Errors do not matter if the terminal is gone.
        let _ = write("\x1b[?25h\x1b[?1049l");
        if let Some(before) = &self.before {
            let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// Columns and rows of the terminal.
pub fn size() -> Option<(usize, usize)> {
    let size = termios::tcgetwinsize(io::stdout()).ok()?;
    let (columns, rows) = (usize::from(size.ws_col), usize::from(size.ws_row));
    (columns > 0 && rows > 0).then_some((columns, rows))
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// The keys in what a terminal sends; sequences that are not known are skipped.
fn parse(bytes: &[u8]) -> Vec<Key> {
    let text = String::from_utf8_lossy(bytes);
    let mut rest = text.as_ref();
    let mut keys = Vec::new();
    while let Some(first) = rest.chars().next() {
        let sequence = rest.strip_prefix("\x1b[").or_else(|| rest.strip_prefix("\x1bO"));
        if let Some(after) = sequence {
            let end = after.find(|c: char| c.is_ascii_alphabetic() || c == '~');
            let end = end.map_or(after.len(), |end| end + 1);
            keys.extend(match &after[..end] {
                "A" => Some(Key::Up),
                "B" => Some(Key::Down),
                "5~" => Some(Key::PageUp),
                "6~" => Some(Key::PageDown),
                "H" | "1~" => Some(Key::Home),
                "F" | "4~" => Some(Key::End),
                _ => None,
            });
            rest = &after[end..];
            continue;
        }
        keys.push(match first {
            '\x1b' => Key::Escape,
            '\r' | '\n' => Key::Enter,
            '\x7f' | '\x08' => Key::Backspace,
            other => Key::Char(other),
        });
        rest = &rest[first.len_utf8()..];
    }
    keys
}

impl View {
    /// Follows a key. Returns whether to quit.
    pub fn press(&mut self, key: Key) -> bool {
        if self.typing {
            match key {
                Key::Enter => self.typing = false,
                Key::Escape => (self.typing, self.filter) = (false, String::new()),
                Key::Backspace => drop(self.filter.pop()),
                Key::Char(c) if !c.is_control() => self.filter.push(c),
                _ => {}
            }
            return false;
        }
        match key {
            Key::Char('q') => return true,
            Key::Char('?') => (self.help, self.from) = (!self.help, 0),
            Key::Char('d') => self.details = !self.details,
            Key::Char('/') => *self = Self { typing: true, ..Self::default() },
            Key::Escape => *self = Self::default(),
            Key::Up | Key::Char('k') => self.from = self.from.saturating_sub(1),
            Key::Down | Key::Char('j') => self.from = self.from.saturating_add(1),
            Key::PageUp => self.from = self.from.saturating_sub(PAGE),
            Key::PageDown | Key::Char(' ') => self.from = self.from.saturating_add(PAGE),
            Key::Home | Key::Char('g') => self.from = 0,
            Key::End | Key::Char('G') => self.from = usize::MAX / 2,
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_that_terminals_send() {
        let sent = b"q\x1b[A\x1bOB\x1b[5~\x1b[1;5C\x1b[F\x7f\r\x1b";
        let keys = [
            Key::Char('q'),
            Key::Up,
            Key::Down,
            Key::PageUp,
            Key::End,
            Key::Backspace,
            Key::Enter,
            Key::Escape,
        ];
        assert_eq!(parse(sent), keys);
        assert_eq!(parse("ü".as_bytes()), [Key::Char('ü')]);
    }

    #[test]
    fn hazard_117_keys_scroll_filter_explain_and_quit() {
        let mut view = View::default();
        let mut press = |keys: &str| {
            let quit = parse(keys.as_bytes()).into_iter().any(|key| view.press(key));
            (quit, view.from, view.filter.clone(), view.help)
        };
        assert_eq!(press("jj\x1b[6~k"), (false, 11, String::new(), false));
        assert_eq!(press("/qx\x7f\r"), (false, 0, "q".into(), false));
        assert_eq!(press("j"), (false, 1, "q".into(), false));
        assert_eq!(press("\x1b?"), (false, 0, String::new(), true));
        assert!(press("q").0);
        view.press(Key::Char('d'));
        assert!(view.details);
    }
}
