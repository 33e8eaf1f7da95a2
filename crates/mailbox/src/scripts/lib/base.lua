-- First part of every script: the clock, numbers, errors, and the loop over a call's items.
--
-- A script receives a list of items: `key_at` and `arg_at` are where an item's KEYS and ARGV begin. It replies with
-- Redis's time in microseconds, then one reply per item. The time does not change while a script runs.
--
-- Numbers stay below 2^53. Packed integers wrap silently, so every value is clamped before it is packed: attempts
-- and seqs by the caller, generations here; a seq without a successor is an error.
--
-- A reply of one item begins with a letter:
--   every script  U  unknown: a newer version has marked the mailbox as critical; nothing was written of it
--                 E  error; its text follows
--   accept        D  done, with a letter for each message: A accepted, O accepted and the user is online,
--                    B accepted before, D duplicate, F failed
--                 G  gap
--   ack           (a number) advanced   R  reset        S  stale
--   confirm       C  confirmed          S  superseded
--   connect       C  connected          S  superseded   M  too many devices   L  too late
--   disconnect    R  removed            K  kept
--   join          J  joined             S  superseded
--   journal       N  numbers
--   fire          C  claimed            N  not due
--   defer         D  deferred           K  kept

local KEYS, ARGV = KEYS, ARGV -- reading a local is faster than reading a global
local call, floor, match = redis.call, math.floor, string.match
local byte, find, format, sub = string.byte, string.find, string.format, string.sub
local pack, parse = struct.pack, struct.unpack
local TIME = call('TIME')
local NOW_US = TIME[1] * 1000000 + TIME[2]
local NOW = floor(NOW_US / 1000)
-- A field of {s}:o: when data of this shard was found missing, ms.
local LOST = 'lost'

-- Formats a whole number as an argument: Redis's own conversion takes several times as long.
local function int(number)
  return format('%d', number)
end

-- The text of what a pcall caught: Redis throws strings and tables.
local function error_text(problem)
  return type(problem) == 'table' and problem.err or tostring(problem)
end

-- Thrown where a newer version has set a critical flag.
local UNKNOWN = 'written by a newer version'
local function is_unknown(problem)
  return error_text(problem) == UNKNOWN
end

-- Runs `step` for each of `count` items, which have `keys` KEYS and `args` ARGV each, beginning at ARGV[first_arg].
-- An item that fails does not affect the others. `on_unknown` is called for an item that a newer version has marked
-- as critical; nothing was written of it.
local function each(count, step, keys, args, first_arg, on_unknown)
  local replies, item = { NOW_US }, 0
  local function rest() -- until one fails: one pcall per item would cost more
    while item < count do
      replies[item + 2] = step(item * keys + 1, item * args + first_arg)
      item = item + 1
    end
  end
  while item < count do
    local ok, problem = pcall(rest)
    if not ok then
      replies[item + 2] = is_unknown(problem) and { 'U' } or { 'E', error_text(problem) }
      if on_unknown and is_unknown(problem) then
        on_unknown(item * keys + 1, item * args + first_arg)
      end
      item = item + 1
    end
  end
  return replies
end
