-- read: the entries after a position. Writes nothing.
--
-- KEYS  an item: head, queue.
-- ARGV  an item: after (seq), entries_max, bytes_max, device or ''.
-- Reply now, then an item:
--       {epoch (0: no mailbox), oldest, chain before it, newest, entries from max(after + 1, oldest), each a stored
--        header (of which the first 37 bytes are the header) and a body; and, if entries after `after` are gone, the
--        device's cursor: seq, chain, generation}  at least one entry, if there is one
--       {'U'}, {'E', text}

local ENTRIES_PER_RANGE = 16 -- entries read at once: a byte bound must not cost the whole list

local function read(key_at, arg_at)
  local after, entries_max = tonumber(ARGV[arg_at]), tonumber(ARGV[arg_at + 1])
  local bytes_max, name = tonumber(ARGV[arg_at + 2]), ARGV[arg_at + 3]
  local mailbox = find_mailbox(KEYS[key_at], KEYS[key_at + 1])
  if not mailbox then return { 0, 1, 0, 0, {} } end
  local oldest = mailbox.oldest
  -- Entries that are gone may have been acknowledged by the device itself: those were not evicted.
  local device = name ~= '' and after < oldest - 1 and find_device(mailbox, name) or {}
  local entries, bytes = {}, 0
  local reply = { mailbox.epoch, oldest, mailbox.chain_before_oldest, mailbox.newest, entries,
    device.seq, device.chain, device.generation }
  local next = max(after + 1, oldest)
  local last = min(next + entries_max - 1, mailbox.newest)
  while next <= last do
    local to = min(next + ENTRIES_PER_RANGE - 1, last)
    local parts =
      call('LRANGE', mailbox.queue, int((next - oldest) * 2), int((to - oldest) * 2 + 1))
    for i = 1, #parts, 2 do
      bytes = bytes + HEADER_BYTES + #parts[i + 1]
      if #entries > 0 and bytes > bytes_max then return reply end
      entries[#entries + 1], entries[#entries + 2] = parts[i], parts[i + 1]
    end
    next = to + 1
  end
  return reply
end

return each(#KEYS / 2, read, 2, 4, 1)
