-- read: the entries after a position. Writes nothing.
--
-- KEYS  an item: head, queue.
-- ARGV  an item: after (seq), entries_max, bytes_max, device or ''.
-- Reply now, then an item: {epoch (0: no mailbox), oldest, the chain before it, newest, entries
--       from max(after + 1, oldest), each its header (as it is kept: the first 37 bytes are the
--       header) and its body, and where entries behind `after` are gone: the device's cursor, its chain
--       and generation}; or {'U'}; or {'E', text}. At least one entry comes if there is one.

local CHUNK = 16 -- entries fetched at once, so that a byte bound does not cost the whole list

local function read(k, a)
  local h = find_head(KEYS[k])
  if not h then return { 0, 1, 0, 0, {} } end
  -- What is gone may have been acknowledged by the device itself: that is no eviction.
  local d = ARGV[a + 3] ~= '' and tonumber(ARGV[a]) < h.b - 1 and find_device(h, ARGV[a + 3])
  local seq, chain, generation = d and d.seq, d and d.chain, d and d.generation
  local entries, bytes = {}, 0
  local next = math.max(tonumber(ARGV[a]) + 1, h.b)
  local last = math.min(next + tonumber(ARGV[a + 1]) - 1, h.n)
  while next <= last do
    local to = math.min(next + CHUNK - 1, last)
    local chunk =
      call('LRANGE', KEYS[k + 1], int((next - h.b) * 2), int((to - h.b) * 2 + 1))
    for i = 1, #chunk, 2 do
      bytes = bytes + HEADER_BYTES + #chunk[i + 1]
      if #entries > 0 and bytes > tonumber(ARGV[a + 2]) then
        return { h.e, h.b, h.bc, h.n, entries, seq, chain, generation }
      end
      entries[#entries + 1], entries[#entries + 2] = chunk[i], chunk[i + 1]
    end
    next = to + 1
  end
  return { h.e, h.b, h.bc, h.n, entries, seq, chain, generation }
end

return each(#KEYS / 2, read, 2, 4, 1)
