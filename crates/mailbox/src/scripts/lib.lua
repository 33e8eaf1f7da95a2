-- Stands in front of every script: the head of a mailbox, its devices, routes and timers.
--
-- head   {s}:h:u:<app>:<user>  hash
--   s  the state, packed (STATE), because parsing numbers costs more than anything else here:
--      e  epoch
--      b  seq of the oldest kept entry, n + 1 where nothing is kept;  bc  the chain before it
--      n  seq of the newest entry, 0 at first;                        nc  the chain after it
--      x  when head and queue expire, ms
--      ct no entry is older than the mailbox keeps before this time, ms
--      kl no collapse key points below this seq; 0: there are none
--      dc how many devices are known
--   i  8-byte hashes of the newest accepted ids, newest last, fewer than 16;  j  of the 64 before;
--      f  the first two bytes of each in j, so that it need not be read: strings cost by the byte
--   k:<key>  the newest seq of a collapse key
--   ds names of the known devices, separated by NUL
--   d:<device>  a device, packed (DEVICE): its cursor seq, chain, generation; when it is re-sent to,
--      ms (0: not); re-sends so far; when it was last seen, ms; its last connection attempt
-- queue  {s}:q:u:<app>:<user>  list: entries b..n, each a 37-byte header and behind it its body
-- routes {s}:r:<app>:<user>    hash: device -> "node incarnation connection attempt platform"
-- timers {s}:t                 zset: app NUL user -> the earliest due time of its devices
--
-- Numbers stay below 2^53. The time is Redis's own, frozen while a script runs; replies begin with
-- it in microseconds.

local call, floor, match = redis.call, math.floor, string.match
local pack, parse = struct.pack, struct.unpack
local TIME = call('TIME')
local NOW_US = TIME[1] * 1000000 + TIME[2]
local NOW = floor(NOW_US / 1000)
local STATE, STATE_BYTES = '<ddddddddd', 72
local DEVICE, DEVICE_BYTES = '<ddddddd', 56

-- A whole number as an argument: Redis's own conversion takes several times as long.
local function int(number)
  return string.format('%d', number)
end

-- A wait of `ms`, spread over ± `jitter`. Redis's math.random repeats itself in every script.
local random = (TIME[1] * 1000003 + TIME[2] * 7919) % 2147483648
local function spread(ms, jitter)
  random = (random * 1103515 + 12345) % 2147483648
  return floor(ms * (1 + jitter * (random / 1073741824 - 1)))
end

-- One step of the chain (barid_core::Chain::step): MurmurHash3's body over a CRC-32.
local function chain_step(chain, crc)
  return (bit.rol(bit.bxor(chain, crc), 13) * 5 + 0xe6546b64) % 4294967296
end

-- The header of the entry at `seq`.
local function header_at(h, queue, seq)
  return call('LINDEX', queue, int((seq - h.b) * 2))
end

-- The chain after an entry.
local function header_chain(header)
  return (parse('<I4', header, 25))
end

local function parse_head(key, state)
  if #state ~= STATE_BYTES then error('corrupt head') end
  local e, b, bc, n, nc, x, ct, kl, dc = parse(STATE, state)
  return { key = key, e = e, b = b, bc = bc, n = n, nc = nc, x = x, ct = ct, kl = kl, dc = dc }
end

local function head_state(h)
  return pack(STATE, h.e, h.b, h.bc, h.n, h.nc, h.x, h.ct, h.kl, h.dc)
end

local function save_head(h)
  call('HSET', h.key, 's', head_state(h))
end

-- The mailbox's head; nil where there is none.
local function find_head(key)
  local state = call('HGET', key, 's')
  return state and parse_head(key, state)
end

-- A new life of a mailbox.
local function new_head(key, queue, candidate)
  call('DEL', key, queue)
  return { key = key, e = tonumber(candidate), b = 1, bc = 0, n = 0, nc = 0, x = 0, ct = 0, kl = 0,
    dc = 0 }
end

-- Head and queue expire together: at the same moment, renewed when a sixteenth has passed, so that
-- both live for `ttl` at least.
local function renew(h, queue, ttl)
  h.x = NOW + ttl + floor(ttl / 16)
  save_head(h)
  call('PEXPIREAT', h.key, int(h.x))
  call('PEXPIREAT', queue, int(h.x))
end

-- The mailbox's head, or a new life of it.
local function open_head(key, queue, candidate, ttl)
  local h = find_head(key) or new_head(key, queue, candidate)
  if h.x - NOW < ttl then renew(h, queue, ttl) end
  return h
end

-- The chain after a position; nil where the entry is not kept.
local function chain_at(h, queue, seq)
  if seq == h.n then return h.nc end
  if seq == h.b - 1 then return h.bc end
  if seq < h.b or seq > h.n then return nil end
  return header_chain(header_at(h, queue, seq))
end

local function parse_device(name, text)
  if #text ~= DEVICE_BYTES then error('corrupt device') end
  local seq, chain, generation, due, attempt, used, fence = parse(DEVICE, text)
  return { name = name, seq = seq, chain = chain, generation = generation, due = due,
    attempt = attempt, used = used, fence = fence }
end

-- A device that nothing is known of: everything that is kept is before it.
local function new_device(h, name, generation)
  return { name = name, seq = h.b - 1, chain = h.bc, generation = generation, due = 0,
    attempt = 0, used = NOW, fence = 0 }
end

local function find_device(h, name)
  local text = call('HGET', h.key, 'd:' .. name)
  return text and parse_device(name, text)
end

local function device_state(d)
  return pack(DEVICE, d.seq, d.chain, d.generation, d.due, d.attempt, d.used, d.fence)
end

local function save_device(h, d)
  call('HSET', h.key, 'd:' .. d.name, device_state(d))
end

local function save(h, d)
  call('HSET', h.key, 's', head_state(h), 'd:' .. d.name, device_state(d))
end

-- All known devices, but for `except`, which is known.
local function other_devices(h, except)
  local names, fields, devices = {}, {}, {}
  if h.dc == (except and 1 or 0) then return devices end
  for name in string.gmatch(call('HGET', h.key, 'ds') or '', '[^%z]+') do
    if name ~= except then
      names[#names + 1] = name
      fields[#fields + 1] = 'd:' .. name
    end
  end
  if #names == 0 then return devices end
  local texts = call('HMGET', h.key, unpack(fields))
  for i, name in ipairs(names) do
    if texts[i] then devices[#devices + 1] = parse_device(name, texts[i]) end
  end
  return devices
end

local function save_names(h, devices)
  local names = {}
  for i, d in ipairs(devices) do names[i] = d.name end
  h.dc = #names
  call('HSET', h.key, 'ds', table.concat(names, '\0'))
end

-- Makes `d` a known device; the caller saves both. Where there are `max` others, the one without a route that was unused
-- for longest is forgotten; false: all of them are online.
local function add_device(h, routes, d, others, max)
  while #others >= max do
    local oldest
    for i, other in ipairs(others) do
      if (not oldest or other.used < others[oldest].used)
        and call('HEXISTS', routes, other.name) == 0 then
        oldest = i
      end
    end
    if not oldest then return false end
    call('HDEL', h.key, 'd:' .. others[oldest].name)
    table.remove(others, oldest)
  end
  local devices = { unpack(others) }
  devices[#devices + 1] = d
  save_names(h, devices)
  return true
end

local function parse_route(text)
  local node, incarnation, connection, attempt, platform =
    match(text, '^(%S+) (%d+) (%d+) (%d+) ?(.*)$')
  if not node then error('corrupt route') end
  return {
    node = node, incarnation = incarnation, connection = connection,
    attempt = tonumber(attempt), platform = platform,
  }
end

-- Sets the user's timer to the earliest due time of these devices, or removes it.
local function set_timer(timers, member, devices)
  local due = 0
  for _, d in ipairs(devices) do
    if d.due > 0 and (due == 0 or d.due < due) then due = d.due end
  end
  if due == 0 then
    call('ZREM', timers, member)
  else
    call('ZADD', timers, int(due), member)
  end
  return due
end

-- Drops collapse keys that point below the oldest entry. The caller saves the head.
local function sweep_keys(h)
  if h.kl == 0 or h.kl >= h.b then return end
  local fields, lowest = call('HGETALL', h.key), 0
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 2) == 'k:' then
      local seq = tonumber(fields[i + 1])
      if seq < h.b then
        call('HDEL', h.key, fields[i])
      elseif lowest == 0 or seq < lowest then
        lowest = seq
      end
    end
  end
  h.kl = lowest
end

-- Drops the entries up to `seq`; `chain` is the one after it. The caller saves the head.
local function trim(h, queue, seq, chain)
  if seq < h.b then return end
  if seq == h.n then
    call('DEL', queue)
  else
    call('LTRIM', queue, int((seq - h.b + 1) * 2), '-1')
  end
  h.b, h.bc = seq + 1, chain
  sweep_keys(h)
end

-- Puts a device's cursor before the oldest kept entry, with a new generation.
local function reset_device(h, d, generation)
  d.generation = math.max(d.generation, generation) + 1
  d.seq, d.chain = h.b - 1, h.bc
end

local function problem_text(problem)
  return type(problem) == 'table' and problem.err or tostring(problem)
end

-- Runs `step` for each item; an item's error is that item's alone.
local function each(count, step, keys, args, first)
  local replies, i = { NOW_US }, 0
  local function rest() -- until one fails: a pcall for each would cost more
    while i < count do
      replies[i + 2] = step(i * keys + 1, i * args + first)
      i = i + 1
    end
  end
  while i < count do
    local ok, problem = pcall(rest)
    if not ok then
      replies[i + 2] = { 'E', problem_text(problem) }
      i = i + 1
    end
  end
  return replies
end
